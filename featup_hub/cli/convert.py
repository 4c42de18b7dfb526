"""``featup-hub convert``: checkpoints of FeatUp's own code as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.outputs import check_output
from featup_hub.cli.terminal import UsageError

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "convert",
        help="convert a FeatUp checkpoint",
        description=(
            "Converts a checkpoint of FeatUp's own code to safetensors, without running code from "
            "it. Keeps the upsampler and the channel norm; drops tensors that only training needs."
        ),
    )
    parser.add_argument("checkpoint", type=Path, metavar="IN.ckpt", help="file to read")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from featup_hub.weights import convert

    if args.out.suffix != ".safetensors":
        raise UsageError(f"the file to write must be named *.safetensors; got {args.out}")
    check_output(args.out.expanduser())
    read = convert(args.checkpoint, args.out)
    norm, flag = ("with its", "") if read.norm else ("without a", " --no-norm")
    print(f"wrote {args.out}: an upsampler for {read.feat_dim} channels, {norm} channel norm")
    print(f"use it: featup-hub upsample IMAGE --upsampler {args.out}{flag} --model ITS_BACKBONE")
    return 0
