"""``featup-hub models``: lists the models, and where their weights are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from featup_hub.cli.env import implementation_lines

if TYPE_CHECKING:
    from featup_hub.registry import ModelCard

__all__ = ["add_parser"]

_PLACES = {
    "shipped": "part of this package",
    "cached": "in the Hugging Face cache",
    "Hub": "downloaded from the Hugging Face Hub at first use",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "models", help="list the models", description="Lists the models and their weights."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all details")
    # `featup-hub env` tells this now.
    parser.add_argument("--impl", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from featup_hub.registry import MODELS, UPSAMPLERS

    if args.impl:
        return _tell_implementations(as_json=args.json)
    rows = [_row(card) for card in MODELS.values()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    columns = ("name", "channels", "stride", "weights", "licence", "backbone")
    cells = [columns, *(tuple(str(row[c] or "any") for c in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())
    print()
    for place in sorted({row["weights"] for row in rows}, key=list(_PLACES).index):
        print(f"{place}: {_PLACES[place]}")
    print(f"--upsampler takes a file, or the name of a shipped upsampler: {', '.join(UPSAMPLERS)}")
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        print(f"{', '.join(row['name'] for row in rows if row['note'] == note)}: {note}")
    return 0


def _tell_implementations(*, as_json: bool) -> int:
    from featup_hub.ops import implementations

    statuses = implementations()
    if as_json:
        print(json.dumps([asdict(status) for status in statuses], indent=2, default=str))
        return 0
    print(*map(implementation_lines, statuses), sep="\n")
    return 0


def _row(card: ModelCard) -> dict[str, Any]:
    return {
        "name": card.name,
        "backbone": card.backbone,
        "channels": card.feat_dim,
        "stride": card.patch_size,
        "image_size": card.image_size,
        "weights": _place(card),
        "licence": card.licence,
        "data": card.data,
        "note": card.note,
    }


def _place(card: ModelCard) -> str:
    """Returns where a model's weights are, without loading them."""
    from featup_hub.backbones import cached_file

    if card.backbone is None or card.backbone_file is not None:
        return "shipped"
    return "cached" if cached_file(card.backbone) else "Hub"
