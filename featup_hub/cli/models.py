"""List the models, and where their weights are."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featup_hub.registry import ModelCard

_PLACES = {
    "shipped": "part of this package",
    "cached": "in the Hugging Face cache",
    "Hub": "downloaded from the Hugging Face Hub at first use",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, with all details")


def run(args: argparse.Namespace) -> int:
    from featup_hub.registry import MODELS, UPSAMPLERS

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


def _row(card: ModelCard) -> dict[str, Any]:
    from featup_hub.backbones import cached_file

    shipped = not card.backbone or card.file is not None
    return {
        "name": card.name,
        "backbone": card.backbone or None,
        "channels": card.feat_dim,
        "stride": card.patch_size,
        "image_size": card.image_size,
        "weights": "shipped" if shipped else "cached" if cached_file(card.backbone) else "Hub",
        "licence": card.licence,
        "data": card.data,
        "note": card.note,
    }
