r"""What would make an implicit fit faster on this machine: bfloat16, torch.compile, neither?

    python -m benchmarks.implicit_speed PHOTO [--size 224 224] [--model TIMM_NAME=FILE]

For each way a fit begins as :func:`featup_hub.fit` begins it; the time of its first step (where a
compiler works), the median of those behind it, in turns with the others, so that a busy machine is
busy for all; then, if asked with ``--whole``, whole fits one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from featup_hub import fit
from featup_hub.image import preprocess, read_image, resize
from featup_hub.training.implicit import PRESETS, Run
from featup_hub.training.training_source import open_backbones

WAYS = ("float32", "bfloat16", "compiled")
WARMING = 5  # steps that the median leaves out


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--whole", action="store_true", help="fit to the end, too")
    chosen = parser.parse_args()
    if chosen.steps <= WARMING:
        parser.error(
            f"--steps must be more than the {WARMING} that are left out; got {chosen.steps}"
        )
    backbone = open_backbones([chosen.model])[chosen.model]
    shown = resize(read_image(chosen.photo), (chosen.size[0], chosen.size[1]))
    image = preprocess(shown, mean=backbone.mean, std=backbone.std)
    configs = {
        way: replace(PRESETS["fast"], precision="bfloat16" if way == "bfloat16" else "float32")
        for way in chosen.ways
    }
    began = time.perf_counter()
    runs = {way: Run(image, backbone, config, None) for way, config in configs.items()}
    looked = (time.perf_counter() - began) / len(runs)
    if "compiled" in runs:
        network = runs["compiled"].objective.model
        network.coordinates = torch.compile(network.coordinates, dynamic=True)
    spent: dict[str, list[float]] = {way: [] for way in runs}
    for step in range(chosen.steps):
        for way, run in runs.items():
            began = time.perf_counter()
            run.step(step, 0.0)
            spent[way].append(time.perf_counter() - began)
    steady = {way: statistics.median(times[WARMING:]) for way, times in spent.items()}
    found: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "size": list(chosen.size),
        "views_s": round(looked, 2),
        "first_step_s": {way: round(times[0], 3) for way, times in spent.items()},
        "step_s": {way: round(seconds, 4) for way, seconds in steady.items()},
    }
    print(json.dumps(found), flush=True)
    for way in chosen.ways if chosen.whole else ():
        if way == "compiled":
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        fitted = fit(image, backbone, configs[way])
        whole = {"way": way, "wall_s": round(time.perf_counter() - wall, 1)}
        whole["cpu_s"] = round(time.process_time() - cpu, 1)
        whole |= {name: round(value, 4) for name, value in fitted.scores.items()}
        print(json.dumps(whole), flush=True)


if __name__ == "__main__":
    main()
