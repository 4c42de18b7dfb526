"""Compares segmentation networks that differ only in the decoder.

    python -m benchmarks.end_to_end camvid:DATA/camvid --seeds 0 1 2 --steps 600

An EfficientNet-Lite0 encoder at stride 16, a decoder, a 1×1 head, all trained together. Decoders:
our stages; bilinear; bilinear behind a residual pair of 1×1 convolutions with as many parameters
as our stages have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import featup_hub
from examples.segmentation_head import Bilinear, build, train
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.report import Row, rows, table, write_csv
from featup_hub.evaluation.sums import Measurement


class Convolutions(nn.Module):
    """x + W₂ gelu(W₁ x): as many parameters as the upsampler has, within 1 %."""

    def __init__(self, channels: int, hidden: int = 110) -> None:
        super().__init__()
        self.pair = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, source: Tensor) -> Tensor:
        """Returns features of the same shape."""
        return source + self.pair(source)


def network(classes: int, decoder: str) -> nn.Module:
    """Builds a network with one of the decoders."""
    if decoder != "resize-conv":
        return build(classes, decoder)
    model = featup_hub.load("efficientnet_lite0")
    head = nn.Sequential(Convolutions(model.feat_dim), nn.Conv2d(model.feat_dim, classes, 1))
    return Bilinear(model, head).eval()


@torch.inference_mode()
def score(trained: nn.Module, name: str, val: Dataset, found: Measurement) -> None:
    """Adds a trained network's sums on whole images."""
    for index in range(len(val)):
        sample = val[index].crop(16)
        labels = trained(sample.normalised())[0].argmax(0)
        found.add(name, sample.sums(labels, None, val.classes))


def main() -> None:
    """Trains and scores every decoder with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="LAYOUT:FOLDER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=0, help="validation images, 0 for all")
    parser.add_argument("--decoders", nargs="+", default=["bilinear", "resize-conv", "jbu"])
    parser.add_argument("--out", type=Path, help="folder for end_to_end.csv")
    chosen = parser.parse_args()
    data, val = open_data(chosen.data, "train"), open_data(chosen.data, "val")
    val = val.spread(chosen.images)
    scored: list[Row] = []
    for seed in chosen.seeds:
        found = Measurement(
            protocol="end to end", data=val.name, backbone=f"seed {seed}", block=val.block
        )
        for decoder in chosen.decoders:
            print(f"seed {seed}, {decoder}", file=sys.stderr)
            torch.manual_seed(seed)
            trained = network(val.classes, decoder)
            train(trained, data, chosen.steps, seed=seed)
            score(trained, decoder, val, found)
        seen = rows([found], versus=("bilinear", "resize-conv"))
        print(table(seen), flush=True)
        scored += seen
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            write_csv(scored, chosen.out / "end_to_end.csv")


if __name__ == "__main__":
    main()
