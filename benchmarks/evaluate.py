"""Scores upsamplers side by side on the research data, with the settings of RESULTS.md.

    python -m benchmarks.evaluate jbu_denoise               # point oracle, under a minute
    python -m benchmarks.evaluate mine.safetensors --full   # every protocol on features
    python -m benchmarks.evaluate jbu_denoise anyup=PLUG.IN:CALLABLE --protocols propagation
        --sets davis --sources vit14_saliency lite16 --looks 1 4

Sums are kept in the cache: a run that was stopped goes on, and a new upsampler joins old ones.
``featup-hub evaluate`` does the same for any data and has the same flags; this script knows where
ours lies, has defaults of its own, and calls ``--val-images`` ``--images``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.sources import SHARED, SOURCES
from featup_hub.cli.flags import add_flags, from_flags
from featup_hub.evaluation.config import EvaluationConfig, Protocol
from featup_hub.evaluation.report import table, write_results
from featup_hub.evaluation.run import evaluate

SETS = ("camvid", "nyu", "ccp", "bsds", "davis")
NAMES = [each.__name__ for each in SOURCES]
FULL: tuple[Protocol, ...] = ("oracle", "preservation", "transfer", "consistency", "cost", "cam")


def main() -> None:
    """Parses arguments, runs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("upsampler", nargs="*", help="FILE, FILE@unit, module:callable, a baseline")
    parser.add_argument("--full", action="store_true", help="every protocol on every source")
    parser.add_argument("--sets", nargs="+", default=("camvid", "nyu"), choices=SETS)
    parser.add_argument("--sources", nargs="*", choices=NAMES, help="whose features")
    parser.add_argument("--metrics", nargs="+", help="show only these scores")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.csv")
    add_flags(parser, EvaluationConfig, flags={"val_images": "--images", "backbones": "--backbone"})
    chosen = parser.parse_args()
    start = time.perf_counter()
    sources = chosen.sources
    if sources is None:
        sources = ["lite16", "lite32", "vit14_saliency"] if chosen.full else []
    preset = EvaluationConfig(
        data=tuple(f"{name}:{SHARED / 'data' / name}" for name in chosen.sets),
        upsamplers=tuple(dict.fromkeys(["bilinear", *chosen.upsampler])),
        backbones=tuple(f"benchmarks.sources:{name}" for name in sources),
        protocols=FULL if chosen.full else ("oracle",),
        strides=(16,),
        reductions=("point",),
        versus=("bilinear",),
        train_images=200,
        transfer_images=50,
        val_images=60 if chosen.full else 12,
        photos=SHARED / "data" / "photos",
        cache=Path.home() / ".cache" / "featup_hub_eval",
    )
    config = from_flags(EvaluationConfig, chosen, preset)

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s {line}", file=sys.stderr, flush=True)

    scored = []
    for rows in evaluate(config, progress=progress):
        shown = [row for row in rows if row.metric in (chosen.metrics or [row.metric])]
        print(table(shown), end="\n\n", flush=True)
        scored += rows
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            write_results(scored, config, chosen.out)


if __name__ == "__main__":
    main()
