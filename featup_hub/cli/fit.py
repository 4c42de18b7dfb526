"""``featup-hub fit``: one image's features at any resolution, as a file."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from featup_hub.cli.devices import open_device
from featup_hub.cli.flags import add_flags
from featup_hub.cli.outputs import check_output
from featup_hub.cli.terminal import UsageError
from featup_hub.files import write_atomically
from featup_hub.image import preprocess, read_image, resize
from featup_hub.model import load_upsampler
from featup_hub.training.implicit import PRESETS, ImplicitConfig, fit
from featup_hub.training.training_source import open_backbones
from featup_hub.visualize import comparison
from featup_hub.weights import metadata

__all__ = ["add_parser"]

_ANY_FORMAT = "featup_hub.implicit/"  # of what a fit notes as the upsampler, whatever its version


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "fit",
        help="fit an implicit upsampler to one image",
        description=(
            "Fits a small network to one image, which then tells its features at any size: "
            "ImplicitUpsampler.load(OUT).features((H, W)) in Python. A picture beside OUT "
            "compares them with the backbone's."
        ),
        epilog="A fit that was stopped goes on when the same command is given again.",
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the image")
    add(
        "--model",
        default="efficientnet_lite0",
        help="whose features: a model's name, or TIMM_NAME=FILE for a timm model with weights "
        "from a file (default: %(default)s)",
    )
    add("--size", type=int, default=224, help="short side in pixels (default: %(default)s)")
    add("--out", type=Path, help="file to write (default: IMAGE's name in this folder)")
    add(
        "--preset",
        choices=list(PRESETS),
        default="fast",
        help="recipe that the options below change; their defaults are those of fast",
    )
    add(
        "--start",
        metavar="FILE",
        help="weights of JBU stages whose features to start from, or a shipped one: jbu_denoise, "
        "jbu_faithful",
    )
    add("--no-picture", action="store_true", help="make no picture")
    add("--overwrite", action="store_true", help="replace files that are of no earlier fit")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add_flags(parser, ImplicitConfig)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in fields(ImplicitConfig) if hasattr(args, f.name)}
    # Before the work, for a fit takes long.
    if args.size < 1:
        raise UsageError(f"--size must be positive; got {args.size}")
    out, checkpoint, picture = _outputs(args)
    if not args.overwrite:
        _check_earlier(out, picture)
    device = open_device(args.device)
    photo = read_image(args.image)
    start = None
    if args.start is not None:
        start = load_upsampler(weights=args.start)
    backbone = open_backbones([args.model])[args.model].eval().to(device)
    patch = backbone.patch_size
    shown = resize(photo, max(round(args.size / patch), 1) * patch, multiple_of=patch)
    image = preprocess(shown, mean=backbone.mean, std=backbone.std).to(device)
    upsampler = fit(
        image,
        backbone,
        PRESETS[args.preset],
        start=start,
        checkpoint=checkpoint,
        progress=True,
        **given,
    )
    upsampler.save(out)
    if picture is not None:
        with torch.no_grad():
            drawn = comparison(shown, backbone(image).float(), upsampler.features())
        with write_atomically(picture) as partial:
            drawn.save(partial, format="PNG")
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out}: " + ", ".join(f"{k} {v:.4g}" for k, v in upsampler.scores.items()))
    return 0


def _outputs(args: argparse.Namespace) -> tuple[Path, Path, Path | None]:
    """Returns the files of fit, checkpoint and picture, none of which replaces what is read."""
    out = args.out or Path(f"{args.image.stem}.safetensors")
    check_output(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"the file to write must be named *.safetensors; got {out}")
    checkpoint = out.with_suffix(".checkpoint.pt")
    picture = None if args.no_picture else out.with_suffix(".png")
    own_weights = args.model.partition("=")[2]
    inputs = [Path(name).expanduser() for name in (args.image, args.start, own_weights) if name]
    for file in filter(None, (out, checkpoint, picture)):
        check_output(file)
        for source in inputs:
            if file.exists() and source.exists() and file.samefile(source):
                advice = "another --out" + (", or --no-picture" if file == picture else "")
                raise UsageError(
                    f"writing {file} would replace {source}, which is read; give {advice}"
                )
    return out, checkpoint, picture


def _check_earlier(out: Path, picture: Path | None) -> None:
    """Raises ValueError where an output exists that no earlier fit made."""
    remedy = "--overwrite replaces it, another --out keeps both"
    if out.exists():
        try:
            made_by = metadata(out).get("upsampler", "")
        except ValueError:
            made_by = ""
        if not made_by.startswith(_ANY_FORMAT):
            raise ValueError(f"{out} exists, and is not of an earlier fit; {remedy}")
    # A picture is made after its features: one that has none beside it is somebody else's.
    elif picture is not None and picture.exists():
        raise ValueError(
            f"{picture} exists, and no features beside it, so it is not of an earlier fit; "
            f"{remedy}, --no-picture does without"
        )
