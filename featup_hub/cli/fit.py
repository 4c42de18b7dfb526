"""``featup-hub fit``: one image's features at any resolution, as a file."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from featup_hub.cli.arguments import open_device
from featup_hub.cli.flags import add_flags
from featup_hub.cli.outputs import check_output
from featup_hub.cli.terminal import UsageError
from featup_hub.training.fit_config import BASIS, PRESETS, FitConfig

__all__ = ["add_parser"]

_FORMATS = ("featup_hub.jbu_fit/", "featup_hub.implicit/")  # entries of fits, in any version


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "fit",
        help="fit the features of one image",
        description=(
            "Finds the features of one image that explain the backbone's features of many views "
            "of it. FittedFeatures.load(OUT).features((H, W)) in Python gives them at any size. A "
            "picture beside OUT compares them with the backbone's."
        ),
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the image")
    add(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME[=FILE]",
        help="the backbone, and a file with its weights if they are your own "
        "(default: %(default)s)",
    )
    add("--size", type=int, default=224, help="short side in pixels (default: %(default)s)")
    add("--out", type=Path, help="file to write (default: IMAGE's name in this folder)")
    add(
        "--preset",
        choices=list(PRESETS),
        default="fast",
        help="fast: exact least squares; upstream: FeatUp's network, for a GPU. The options below "
        "change the preset; the defaults shown are those of fast",
    )
    add(
        "--upsampler",
        metavar="NAME|FILE",
        help="JBU stages that least squares use: a shipped upsampler, jbu_denoise or jbu_faithful, "
        "or a file (default: %(default)s)",
        default=BASIS,
    )
    add("--start", dest="upsampler", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--no-picture", action="store_true", help="make no picture")
    add(
        "--overwrite",
        action="store_true",
        help="also replace files that an earlier fit did not make",
    )
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add_flags(parser, FitConfig)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import torch

    from featup_hub.files import write_atomically
    from featup_hub.image import preprocess, read_image, resize
    from featup_hub.loading import load_backbone, load_upsampler, name_and_file
    from featup_hub.training.fit import fit
    from featup_hub.visualize import comparison

    given = {f.name: getattr(args, f.name) for f in fields(FitConfig) if hasattr(args, f.name)}
    # Checked before the slow fit.
    if args.size < 1:
        raise UsageError(f"--size must be positive; got {args.size}")
    out, picture = _outputs(args)
    if not args.overwrite:
        _check_earlier(out, picture)
    device = open_device(args.device)
    photo = read_image(args.image)
    upsampler = load_upsampler(args.upsampler, device=device)
    name, file = name_and_file(args.model)
    backbone = load_backbone(name, weights=file).to(device)
    patch = backbone.patch_size
    shown = resize(photo, max(round(args.size / patch), 1) * patch, multiple_of=patch)
    image = preprocess(shown, mean=backbone.mean, std=backbone.std).to(device)
    config = replace(PRESETS[args.preset], **given)
    fitted = fit(image, backbone, config, upsampler=upsampler, progress=True)
    fitted.save(out)
    if picture is not None:
        with torch.no_grad():
            drawn = comparison(shown, backbone(image).float(), fitted.features())
        with write_atomically(picture) as partial:
            drawn.save(partial, format="PNG")
    print(f"wrote {out}: " + ", ".join(f"{k} {v:.4g}" for k, v in fitted.scores.items()))
    return 0


def _outputs(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Returns the files of the fit and the picture; refuses to replace inputs."""
    out = args.out or Path(f"{args.image.stem}.safetensors")
    check_output(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"the file to write must be named *.safetensors; got {out}")
    picture = None if args.no_picture else out.with_suffix(".png")
    own_weights = args.model.partition("=")[2]
    inputs = [Path(name).expanduser() for name in (args.image, args.upsampler, own_weights) if name]
    for file in filter(None, (out, picture)):
        check_output(file)
        for source in inputs:
            if file.exists() and source.exists() and file.samefile(source):
                advice = "another --out" + (", or --no-picture" if file == picture else "")
                raise UsageError(
                    f"writing {file} would replace {source}, which is read; give {advice}"
                )
    return out, picture


def _check_earlier(out: Path, picture: Path | None) -> None:
    """Raises ValueError if an output exists that an earlier fit did not make."""
    remedy = "--overwrite replaces it, another --out keeps both"
    from featup_hub.weights import metadata

    if out.exists():
        try:
            made_by = metadata(out).get("upsampler", "")
        except ValueError:
            made_by = ""
        if not made_by.startswith(_FORMATS):
            raise ValueError(f"{out} exists, and is not of an earlier fit; {remedy}")
    # A fit writes the picture after the features, so a picture without features is not of a fit.
    elif picture is not None and picture.exists():
        raise ValueError(
            f"{picture} exists without features, so it is not of an earlier fit; "
            f"{remedy}, --no-picture does without"
        )
