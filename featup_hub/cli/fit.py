"""``featup-hub fit``: one image's features at any resolution, as a file."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from featup_hub.cli.devices import open_device
from featup_hub.cli.flags import add_flags
from featup_hub.cli.terminal import UsageError
from featup_hub.image import preprocess, read_image, resize, write_atomically
from featup_hub.model import load_upsampler
from featup_hub.training.implicit import PRESETS, ImplicitConfig, fit
from featup_hub.training.sources import open_backbones
from featup_hub.visualize import comparison

__all__ = ["add_parser"]


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
        help="weights of JBU stages whose features to start from, or jbu_universal, the shipped",
    )
    add("--no-picture", action="store_true", help="make no picture")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add_flags(parser, ImplicitConfig)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in fields(ImplicitConfig) if hasattr(args, f.name)}
    out = args.out or Path(f"{args.image.stem}.safetensors")
    # Before the work, for a fit takes long.
    if args.size < 1:
        raise UsageError(f"--size must be positive; got {args.size}")
    if out.is_dir() or not out.parent.is_dir():
        wrong = "it is a folder" if out.is_dir() else "its folder does not exist"
        raise UsageError(f"--out must be a file that can be written; {out}: {wrong}")
    device = open_device(args.device)
    photo = read_image(args.image)
    start = None
    if args.start is not None:
        start = load_upsampler(weights=None if args.start == "jbu_universal" else args.start)
    backbone = open_backbones([args.model])[args.model].eval().to(device)
    patch = backbone.patch_size
    shown = resize(photo, max(round(args.size / patch), 1) * patch, multiple_of=patch)
    image = preprocess(shown, mean=backbone.mean, std=backbone.std).to(device)
    checkpoint = out.with_suffix(".checkpoint.pt")
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
    if not args.no_picture:
        with torch.no_grad():
            picture = comparison(shown, backbone(image).float(), upsampler.features())
        with write_atomically(out.with_suffix(".png")) as partial:
            picture.save(partial, format="PNG")
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out}: " + ", ".join(f"{k} {v:.4g}" for k, v in upsampler.scores.items()))
    return 0
