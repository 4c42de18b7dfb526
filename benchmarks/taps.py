"""Trains with and without the filter gradients that upstream's CUDA code drops.

    python -m benchmarks.taps PHOTOS camvid:DATA/camvid nyu:DATA/nyu --out runs/taps

Every seed trains twice with one difference: the kernels get the gradients of all 49 taps, or of the
seven that upstream's backward pass computes. Neither keeps kernels to a sum of one unless asked:
the projection that does so moves the taps that get no gradient, and seven taps diverge (LOG.md).
Both are scored by the label oracle, frozen and transfer probes, multi-view consistency and
activation maps of the photographs. A difference is paired over images within a seed; over seeds,
the mean and its 95 % interval by Student's t are given. Stopped, it goes on.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.report import Row
from featup_hub.evaluation.run import evaluate
from featup_hub.training.jbu import UPSTREAM_TAPS, JBUTrainingConfig, train

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""Student's t at 97.5 %, by degrees of freedom."""


def trained(chosen: argparse.Namespace) -> list[str]:
    """Trains all, and returns them as the evaluation names them."""
    found = []
    for seed in range(chosen.seeds):
        for name, taps in (("all", ()), ("seven", UPSTREAM_TAPS)):
            folder = chosen.out / f"{name}_{seed}"
            config = JBUTrainingConfig(
                steps=chosen.steps,
                batch=2,
                views=3,
                image_size=192,
                region_weight=chosen.region_weight,
                region_field=1.0 if chosen.region_weight else 0.0,
                lr=chosen.lr,
                unit_sum=chosen.unit_sum,
                kernel_taps=taps,
                seed=seed,
            )
            file = train(chosen.photos, folder, config)
            found.append(f"{name}_{seed}={file}" + ("@unit" if chosen.score_unit else ""))
    return found


def summary(rows: Iterable[Row], seeds: int) -> list[dict[str, object]]:
    """Sets all taps against seven, per score: means over seeds, difference and its interval."""
    scores: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        unit = 100 if row.percent else 1
        key = (row.protocol, row.data, row.backbone, row.metric)
        scores[key][row.upsampler] = unit * row.score.value
    table = []
    for key, by_name in scores.items():
        both = [[by_name[f"{name}_{seed}"] for seed in range(seeds)] for name in ("all", "seven")]
        gaps = [a - b for a, b in zip(*both, strict=True)]
        half = T_975[seeds - 1] * statistics.stdev(gaps) / seeds**0.5
        table.append(
            dict(zip(("protocol", "data", "features", "score"), key, strict=True))
            | {
                "bilinear": round(by_name["bilinear"], 3),
                "seven taps": round(statistics.mean(both[1]), 3),
                "all taps": round(statistics.mean(both[0]), 3),
                "difference": round(statistics.mean(gaps), 3),
                "±": round(half, 3),
                "by seed": " ".join(f"{gap:+.3f}" for gap in gaps),
            }
        )
    return table


def main() -> None:
    """Trains, evaluates, prints Markdown and writes ``taps.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("data", nargs="+", help="LAYOUT:FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 10))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3, help="default: upstream's")
    parser.add_argument("--unit-sum", action="store_true", help="keep kernels to a sum of one")
    parser.add_argument(
        "--score-unit", action="store_true", help="score kernels divided by their sum"
    )
    parser.add_argument("--region-weight", type=float, default=0.0)
    parser.add_argument("--images", type=int, default=60, help="validation images of each set")
    parser.add_argument("--cache", type=Path, help="of features")
    chosen = parser.parse_args()
    config = EvaluationConfig(
        data=tuple(chosen.data),
        upsamplers=("bilinear", *trained(chosen)),
        protocols=("oracle", "preservation", "transfer", "consistency", "cam"),
        strides=(16,),
        reductions=("point",),
        versus=("bilinear",),
        train_images=200,
        transfer_images=50,
        val_images=chosen.images,
        photos=chosen.photos,
        cache=chosen.cache or chosen.out / "cache",
    )
    found = evaluate(config, progress=lambda line: print(line, file=sys.stderr))
    table = summary(chain.from_iterable(found), chosen.seeds)
    with (chosen.out / "taps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print("| " + " | ".join(table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for line in table:
        print("| " + " | ".join(map(str, line.values())) + " |")


if __name__ == "__main__":
    main()
