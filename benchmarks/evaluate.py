"""Scores upsamplers side by side on the research data, with the settings of RESULTS.md.

    python -m benchmarks.evaluate jbu_denoise               # point oracle, under a minute
    python -m benchmarks.evaluate mine.safetensors --full   # every protocol on features
    python -m benchmarks.evaluate jbu_denoise anyup=PLUG.IN:CALLABLE --protocols propagation
        --sets davis --sources vit lite16 --looks 1 4

Sums are kept in the cache: a run that was stopped goes on, and a new upsampler joins old ones.
``featup-hub evaluate`` does the same for any data; this script knows where ours lies.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from benchmarks.sources import SHARED, SOURCES
from featup_hub.evaluation.config import EvaluationConfig, Protocol
from featup_hub.evaluation.report import table, write_results
from featup_hub.evaluation.run import evaluate

SETS = ("camvid", "nyu", "ccp", "bsds", "davis")
FULL = ("oracle", "preservation", "transfer", "consistency", "cost", "cam")


def main() -> None:
    """Parses arguments, runs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("upsampler", nargs="*", help="FILE, FILE@unit, module:callable, a baseline")
    parser.add_argument("--full", action="store_true", help="every protocol on every source")
    parser.add_argument("--sets", nargs="+", default=("camvid", "nyu"), choices=SETS)
    parser.add_argument("--strides", nargs="*", type=int, default=[16], help="of the label oracle")
    parser.add_argument("--sources", nargs="*", choices=SOURCES, help="whose features")
    parser.add_argument("--looks", nargs="+", type=int, default=[1], help="of the backbone")
    parser.add_argument("--images", type=int, help="validation images of each set, 0 for all")
    parser.add_argument("--train-images", type=int, default=200, help="images a probe is fitted on")
    parser.add_argument("--transfer-images", type=int, default=50, help="of a transfer probe")
    parser.add_argument("--max-side", type=int, default=0, help="resize longer images to this")
    parser.add_argument("--cost-images", type=int, default=5, help="of time and memory")
    parser.add_argument("--area", action="store_true", help="the area oracle, too")
    parser.add_argument("--protocols", nargs="+", choices=get_args(Protocol))
    parser.add_argument("--photo-images", type=int, default=200, help="of the activation maps")
    parser.add_argument("--metrics", nargs="+", help="show only these scores")
    parser.add_argument("--versus", nargs="+", default=["bilinear"], metavar="NAME")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "featup_hub_eval")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.csv")
    chosen = parser.parse_args()
    start = time.perf_counter()

    protocols = chosen.protocols or (FULL if chosen.full else ["oracle"])
    sources = chosen.sources
    if sources is None:
        sources = ["lite16", "lite32", "vit"] if chosen.full else []
    images = chosen.images if chosen.images is not None else 60 if chosen.full else 12
    config = EvaluationConfig(
        data=tuple(f"{name}:{SHARED / 'data' / name}" for name in chosen.sets),
        upsamplers=tuple(dict.fromkeys(["bilinear", *chosen.upsampler])),
        backbones=tuple(SOURCES[name] for name in sources),
        protocols=tuple(protocols),
        looks=tuple(chosen.looks),
        strides=tuple(chosen.strides),
        reductions=("point", "area") if chosen.area else ("point",),
        versus=tuple(chosen.versus),
        train_images=chosen.train_images,
        transfer_images=chosen.transfer_images,
        val_images=images,
        max_side=chosen.max_side,
        cost_images=chosen.cost_images,
        photos=SHARED / "data" / "photos",
        photo_images=chosen.photo_images,
        cache=chosen.cache,
    )

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
