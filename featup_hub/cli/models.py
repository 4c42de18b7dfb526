"""``featup-hub models``: which models there are, and where their weights are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from featup_hub.cli.env import implementation_lines

if TYPE_CHECKING:
    from featup_hub.registry import ModelCard, WeightFile

__all__ = ["add_parser"]

_PLACES = {
    "shipped": "came with this package",
    "cached": "in the Hugging Face cache",
    "Hub": "downloaded from the Hugging Face Hub at first use",
    "missing": "neither here nor on the Hub",
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
    files = [file for file in (card.backbone_file, card.upsampler_file) if file is not None]
    return {
        "name": card.name,
        "backbone": card.backbone,
        "channels": card.feat_dim,
        "stride": card.patch_size,
        "image_size": card.image_size,
        "weights": max(map(_place, files), key=list(_PLACES).index),
        "licence": card.licence,
        "data": card.data,
        "note": files[0].note,
        "scores": dict(card.scores),
    }


def _place(file: WeightFile) -> str:
    """Says where a file would be taken from, without taking it."""
    import huggingface_hub as hub

    from featup_hub.weights import shipped_folder

    if (shipped_folder() / file.filename).is_file():
        return "shipped"
    if file.repo_id is None:
        return "missing"
    found = hub.try_to_load_from_cache(file.repo_id, file.filename, revision=file.revision)
    return "cached" if isinstance(found, str) else "Hub"
