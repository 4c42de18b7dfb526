"""``featup-hub export``: a model as a file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from featup_hub.cli.outputs import check_output
from featup_hub.cli.terminal import UsageError
from featup_hub.export import check_onnx, trace, write_onnx, write_pt2
from featup_hub.model import load

__all__ = ["add_parser"]

_WRITERS = {"onnx": write_onnx, "pt2": write_pt2}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        help="write a model as ONNX or as a PyTorch program",
        description=(
            "Writes a model, image in and features at its resolution out, for any batch and every "
            "image whose sides are multiples of the model's stride. Images come normalised as "
            "ImageNet's, (B, 3, H, W)."
        ),
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="file to write")
    add("--format", choices=tuple(_WRITERS), help="default: what the name of OUT ends in")
    add("--model", default="efficientnet_lite0", help="its name (default: %(default)s)")
    add("--weights", type=Path, metavar="FILE", help="an upsampler of your own, or jbu_faithful")
    add("--backbone-weights", type=Path, metavar="FILE", help="weights of your own, as timm's")
    add("--no-norm", action="store_true", help="do not normalise features before upsampling")
    add("--static", metavar="HxW", help="one image of this size only, such as 224x224")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    chosen = args.format or args.out.suffix[1:]
    if chosen not in _WRITERS:
        raise UsageError(f"the file to write must be named *.onnx or *.pt2; got {args.out}")
    if chosen == "onnx":
        check_onnx()
    check_output(args.out)
    size = _static(args.static)
    model = load(
        args.model,
        use_norm=not args.no_norm,
        weights=args.weights,
        backbone_weights=args.backbone_weights,
    )
    height, width = size or (2 * model.patch_size, 3 * model.patch_size)
    image = torch.zeros(1, 3, height, width)
    _WRITERS[chosen](trace(model, image, dynamic=size is None), args.out)
    sizes = f"{height} x {width}" if size else f"sides in multiples of {model.patch_size}"
    print(f"wrote {args.out}: images with {sizes} in, {model.feat_dim} channels out")
    return 0


def _static(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--static must be HxW, such as 224x224; got {text!r}")
    return int(sides[0]), int(sides[1])
