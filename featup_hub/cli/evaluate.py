"""Score upsamplers side by side on labelled data.

All see the same images and features. Paired differences have 95 % intervals over images.
Example: featup-hub evaluate --data camvid:DATA/camvid nyu:DATA/nyu --upsamplers
bilinear bicubic mine.safetensors --protocols oracle --val-images 12
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from featup_hub.cli.arguments import complain, make_folder
from featup_hub.cli.flags import add_flags, from_flags, in_terms_of_flags
from featup_hub.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from featup_hub.evaluation.report import Row

_FLAGS = {"backbones": "--backbone"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="folder for results.json, results.csv and results.png"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_flags(parser, EvaluationConfig, flags=_FLAGS)


def run(args: argparse.Namespace) -> int:
    from featup_hub.evaluation.report import as_json, draw, table, write_results
    from featup_hub.evaluation.run import evaluate

    start = time.monotonic()
    if "" not in sys.path:  # for plug-ins in the working folder; last, so that it hides no library
        sys.path.append("")

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - start:.0f} s] {line}", file=sys.stderr, flush=True)

    if args.out:
        make_folder(args.out)
    with in_terms_of_flags(EvaluationConfig, flags=_FLAGS):
        config = from_flags(EvaluationConfig, args)
        results = evaluate(config, progress=progress)
    scored: list[Row] = []
    for rows in results:
        if not args.json:
            print(table(rows), end="\n\n", flush=True)
        scored += rows
        if args.out:  # after every table, so that a stopped run keeps its results
            write_results(scored, config, args.out)
    if args.out:
        if any(row.versus for row in scored):
            try:
                draw(scored, args.out / "results.png")
            except ImportError as error:  # the results themselves are written
                complain(str(error), "warning")
        print(f"wrote results to {args.out}", file=sys.stderr)
    if args.json:
        print(as_json(scored, config))
    return 0
