"""Scores upsamplers side by side on CamVid and NYU, with the settings of RESULTS.md.

    python -m benchmarks.evaluate jbu_universal             # point oracle, under a minute
    python -m benchmarks.evaluate mine.safetensors --full   # every protocol, see RESULTS.md

Sums are kept in the cache: a run that was stopped goes on, another upsampler joins old ones. With
``--jobs``, processes of one thread fill it first: one for each set, one for activation maps.

``featup-hub evaluate`` does the same for any data; this script knows where ours lies.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from featup_hub.evaluation.config import EvaluationConfig, Protocol
from featup_hub.evaluation.protocol import evaluate
from featup_hub.evaluation.report import table, write_csv, write_json

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
VIT = (
    "vit14_saliency=timm/vit_small_patch14_dinov2.lvd142m"
    f"@{SHARED}/backbones/dinov2_vits14_saliency_ft.safetensors"
)
BACKBONES = {
    "lite16": "efficientnet_lite0",
    "lite32": "efficientnet_lite0_stride32",
    "vit": VIT,
}
SETS = ("camvid", "nyu")


def main() -> None:
    """Parses arguments, runs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("upsampler", nargs="*", help="FILE, FILE@unit, module:callable, a baseline")
    parser.add_argument("--full", action="store_true", help="every protocol, all strides")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--strides", nargs="*", type=int, help="of the label oracle")
    parser.add_argument("--backbones", nargs="*", choices=BACKBONES, help="whose features")
    parser.add_argument("--images", type=int, help="validation images of each set, 0 for all")
    parser.add_argument("--train-images", type=int, default=200, help="images a probe is fitted on")
    parser.add_argument("--transfer-images", type=int, default=50, help="of a transfer probe")
    parser.add_argument("--area", action="store_true", help="the area oracle, too")
    parser.add_argument("--protocols", nargs="+", choices=get_args(Protocol))
    parser.add_argument("--photo-images", type=int, default=200, help="of the activation maps")
    parser.add_argument("--metrics", nargs="+", help="show only these scores")
    parser.add_argument("--versus", nargs="+", default=["bilinear", "bicubic"], metavar="NAME")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "featup_hub_eval")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.csv")
    parser.add_argument("--jobs", type=int, default=1, help="processes that fill the cache first")
    chosen = parser.parse_args()
    start = time.perf_counter()

    full = chosen.full
    protocols = chosen.protocols or (get_args(Protocol) if full else ["oracle"])
    strides = chosen.strides if chosen.strides is not None else [8, 14, 16, 32] if full else [16]
    names = chosen.backbones if chosen.backbones is not None else list(BACKBONES) if full else []
    images = chosen.images if chosen.images is not None else 60 if full else 12
    config = EvaluationConfig(
        data=tuple(f"{name}:{SHARED / 'data' / name}" for name in chosen.sets),
        upsamplers=tuple(dict.fromkeys(["bilinear", "bicubic", *chosen.upsampler])),
        backbones=tuple(BACKBONES[name] for name in names),
        protocols=tuple(protocols),
        strides=tuple(strides),
        reductions=("point", "area") if chosen.area else ("point",),
        versus=tuple(chosen.versus),
        train_images=chosen.train_images,
        transfer_images=chosen.transfer_images,
        val_images=images,
        photos=SHARED / "data" / "photos",
        photo_images=chosen.photo_images,
        cache=chosen.cache,
    )

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s {line}", file=sys.stderr)

    if chosen.jobs > 1:
        fill_cache(chosen.sets, protocols, chosen.jobs)
        progress("the cache is filled; the rest follows")
    scored = []
    for rows in evaluate(config, progress=progress):
        shown = [row for row in rows if row.metric in (chosen.metrics or [row.metric])]
        print(table(shown), end="\n\n", flush=True)
        scored += rows
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            write_json(scored, config, chosen.out / "results.json")
            write_csv(scored, chosen.out / "results.csv")
    progress("done")


def fill_cache(sets: Sequence[str], protocols: Sequence[str], jobs: int) -> None:
    """Runs parts of this command, whose sums go into the cache, side by side.

    Args:
        sets: A part for each of these.
        protocols: What to measure, the cost left out, which wants to be alone.
        jobs: Parts at a time.

    Raises:
        subprocess.CalledProcessError: If one failed, after the others have ended.
    """
    own = [name for name in protocols if name not in ("cam", "cost")]
    parts = [["--sets", name, "--protocols", *own] for name in sets if own]
    parts += [["--protocols", "cam"]] if "cam" in protocols else []

    def run(part: list[str]) -> None:
        with tempfile.TemporaryDirectory() as out:
            options = [*sys.argv[1:], "--jobs", "1", "--out", out, *part]
            command = [sys.executable, "-m", "benchmarks.evaluate", *options]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, parts))


if __name__ == "__main__":
    main()
