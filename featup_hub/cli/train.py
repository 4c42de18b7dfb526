"""``featup-hub train``: trains stages on photographs."""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.arguments import open_device
from featup_hub.cli.flags import add_flags, from_flags, in_terms_of_flags
from featup_hub.cli.outputs import make_folder
from featup_hub.training.config import JBUTrainingConfig

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="train an upsampler on photographs",
        description="Trains an upsampler on photographs without labels, by multi-view consistency.",
        epilog="The same command resumes a stopped run.",
    )
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photographs")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for jbu.safetensors, metrics.csv and checkpoint.pt",
    )
    add_flags(parser, JBUTrainingConfig, flags={"backbones": "--model"})
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from featup_hub.training.jbu import train

    with in_terms_of_flags(JBUTrainingConfig):
        config = from_flags(JBUTrainingConfig, args)
    open_device(config.device)
    make_folder(args.out)
    print(f"wrote {train(args.photos, args.out, config)}")
    return 0
