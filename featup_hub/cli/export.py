"""Write a model as ONNX or as a PyTorch program.

It computes features at image resolution, for any batch size and any sides that are multiples of the
backbone's stride; a network of a fixed size needs --static. Images must be normalised with
ImageNet's mean and deviation, (B, 3, H, W).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from featup_hub.cli.arguments import UsageError, check_output, choose_model
from featup_hub.cli.flags import add_model, parse_size

_FORMATS = ("onnx", "pt2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="file to write")
    add("--format", choices=_FORMATS, help="default: by the suffix of OUT")
    add_model(parser)
    add(
        "--static",
        type=parse_size,
        metavar="HxW",
        help="only one image of this size, such as 224x224",
    )


def run(args: argparse.Namespace) -> int:
    form = args.format or args.out.suffix[1:]
    if form not in _FORMATS:
        raise UsageError(f"the file to write must be named *.onnx or *.pt2; got {args.out}")
    check_output(args.out)
    size = args.static
    if size is not None and (not isinstance(size, tuple) or 0 in size):
        raise UsageError(f"--static must be HxW, such as 224x224; got {size}")
    chosen = choose_model(args)

    import torch

    from featup_hub.export import check_onnx, trace, write_onnx, write_pt2
    from featup_hub.loading import load

    for_onnx = form == "onnx"
    if for_onnx:
        check_onnx()
    model = load(chosen.card, **chosen.options)
    stride = model.patch_size * model.stack.looks_per_side
    height, width = size or (2 * stride, 3 * stride)
    print(f"[1/2] tracing {args.model}", file=sys.stderr, flush=True)
    example = torch.zeros(1, 3, height, width)
    program = trace(model, example, dynamic=size is None, for_onnx=for_onnx)
    print(f"[2/2] writing {args.out}", file=sys.stderr, flush=True)
    (write_onnx if for_onnx else write_pt2)(program, args.out)
    sizes = f"{height} x {width}" if size else f"sides in multiples of {stride}"
    print(f"wrote {args.out}: images with {sizes} in, {model.feat_dim} channels out")
    return 0
