"""Train an upsampler on photographs.

The photographs need no labels: training uses multi-view consistency. The same command resumes a
stopped run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.arguments import make_folder, usage_errors
from featup_hub.cli.flags import add_flags, from_flags, in_terms_of_flags
from featup_hub.training.config import JBUTrainingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photographs")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for jbu.safetensors, metrics.csv and checkpoint.pt",
    )
    add_flags(parser, JBUTrainingConfig, flags={"backbones": "--model"})


def run(args: argparse.Namespace) -> int:
    from featup_hub.loading import open_device
    from featup_hub.training.jbu import train

    with in_terms_of_flags(JBUTrainingConfig):
        config = from_flags(JBUTrainingConfig, args)
    with usage_errors():
        open_device(config.device)
    make_folder(args.out)
    print(f"wrote {train(args.photos, args.out, config)}")
    return 0
