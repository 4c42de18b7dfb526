"""A training run small enough for a test, and its metrics."""

from __future__ import annotations

import csv

from featup_hub.training.config import JBUTrainingConfig

SMALL = JBUTrainingConfig(
    backbones=("stem",), steps=4, batch=2, image_size=32, views=2, max_pad=4, projection_dim=6,
    crf_samples=50,
)  # fmt: skip


def rows(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
