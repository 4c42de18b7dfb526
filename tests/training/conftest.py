"""A folder of small photographs and a backbone to train with."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.training.config import JBUTrainingConfig
from featup_hub.training.jbu import train

SMALL = JBUTrainingConfig(
    backbones=("stem",), steps=4, batch=2, image_size=32, views=2, max_pad=4, projection_dim=6,
    crf_samples=50,
)  # fmt: skip


def rows(path):
    """The metrics of a run, without the seconds."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


class Stem(Backbone):
    """One strided convolution with fixed weights: the smallest backbone there is."""

    def __init__(self, patch_size: int = 8, feat_dim: int = 12, seed: int = 0) -> None:
        super().__init__(feat_dim=feat_dim, patch_size=patch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, feat_dim, patch_size, patch_size)

    def features(self, image: Tensor) -> Tensor:
        return self.conv(image).relu()


@pytest.fixture
def stem() -> Stem:
    return Stem()


@pytest.fixture
def small(photos: Path, stem: Stem):
    """Trains the small run in a folder, and returns its file of weights."""

    def small(out, *, photos=photos, stem=stem, **changes):
        config = replace(SMALL, **changes)
        return train(photos, out, config, backbones={"stem": stem}, progress=False)

    return small


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine photographs of coloured discs, one in a subfolder, one grey, and a file of notes."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    draw = np.random.default_rng(0)
    for n in range(9):
        height, width = draw.integers(60, 110, 2)
        y, x = np.mgrid[:height, :width]
        picture = np.broadcast_to(draw.integers(0, 256, 3), (height, width, 3)).copy()
        for _ in range(5):
            cy, cx, r = draw.uniform((0, 0, 8), (100, 100, 30))
            picture[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = draw.integers(0, 256, 3)
        image = Image.fromarray(picture.astype(np.uint8))
        if n == 3:
            image = image.convert("L")
        image.save(folder / ("more/p.PNG" if n == 8 else f"p{n}.png"))
    (folder / "notes.txt").write_text("not a photograph")
    return folder
