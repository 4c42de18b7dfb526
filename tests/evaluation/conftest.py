"""Synthetic scenes in the plain layout, with known right answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

from featup_hub.backbones import Backbone
from featup_hub.evaluation.layouts import open_data

EDGE = 20
"""Column of the scenes' vertical edge: 4 px to the right of a border of 16-px cells."""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Dark and bright halves, labels 0 and 1, 1 m and 3 m, four of train and three of val."""
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 4), ("val", 3)):
        for kind in ("images", "labels", "depth"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            right = np.zeros((32, 48), dtype=bool)
            right[:, EDGE:] = True
            shades = np.where(right, 220 + index, 30)
            files = {
                "images": shades[..., None].repeat(3, 2),
                "labels": right,
                "depth": np.where(right, 60, 20),
            }
            for kind, values in files.items():
                picture = Image.fromarray(values.astype(np.uint8))
                picture.save(root / split / kind / f"{index}.png")
    description = {"classes": 2, "depth_scale": 20}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root


@pytest.fixture
def splits(scenes):
    """The scenes' training and validation split."""
    return open_data(f"folder:{scenes}", "train"), open_data(f"folder:{scenes}", "val")


class MeanColour(Backbone):
    """Features whose right answer is known: the mean colour of every cell, times a factor."""

    def __init__(self, stride=16, factor=1.0):
        super().__init__(feat_dim=3, patch_size=stride)
        self.factor, self.calls = factor, 0

    def features(self, image):
        self.calls += 1
        return F.avg_pool2d(image, self.patch_size) * self.factor
