"""Convert a FeatUp checkpoint to safetensors.

Reads a checkpoint of FeatUp's own code without running code from it. Keeps the upsampler and the
channel norm; drops tensors that only training needs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.arguments import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="IN.ckpt", help="file to read")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")


def run(args: argparse.Namespace) -> int:
    from featup_hub.weights import convert

    check_output(args.out.expanduser(), ".safetensors")
    read = convert(args.checkpoint, args.out)
    norm, flag = ("with its", "") if read.norm else ("without a", " --no-norm")
    print(f"wrote {args.out}: an upsampler for {read.feat_dim} channels, {norm} channel norm")
    print(f"use it: featup-hub upsample IMAGE --upsampler {args.out}{flag} --model ITS_BACKBONE")
    return 0
