"""The configurations of training and of fits. The command line has a flag for each field."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

BASIS = "jbu_faithful"  # the views are averaged anyway, so averaging stages add nothing

_FINITE = sys.float_info.max
_Ranges = Mapping[tuple[float, float], tuple[str, ...]]
_TRAINING_RANGES: _Ranges = {
    (1, _FINITE): (
        *("steps", "batch", "image_size", "max_aspect", "max_stride", "views", "max_zoom"),
        *("projection_dim", "crf_samples", "region_channels"),
    ),
    (0, _FINITE): (
        *("max_pad", "crf_weight", "tv_weight", "region_weight", "region_noise"),
        *("lr", "final_lr", "warmup"),
    ),
    # Infinity: no clipping, and no checkpoints between start and end.
    (0, math.inf): ("max_grad_norm", "checkpoint_minutes"),
    (0, 1): ("min_scale", "region_field", "ema", "dropout"),
}
"""Fields by the least and largest value allowed. The trainer checks ``parts``."""
_FIT_RANGES: _Ranges = {
    (1, _FINITE): ("views", "held_out", "max_zoom", "steps", "batch", "components"),
    (0, _FINITE): ("max_pad", "lr"),
}


def _check(config: object, ranges: _Ranges, **choices: tuple[str, str]) -> None:
    """Raises ValueError for a number out of its range, or an unknown choice."""
    for name, (one, other) in choices.items():
        if (value := getattr(config, name)) not in (one, other):
            raise ValueError(f"{name} must be {one!r} or {other!r}; got {value!r}")
    for (least, most), names in ranges.items():
        for name in names:
            value = getattr(config, name)
            if not math.isfinite(value) and most == _FINITE:
                raise ValueError(f"{name} must be a finite number; got {value}")
            if not least <= value <= most:
                allowed = f"at least {least}" if most >= _FINITE else f"from {least} to {most}"
                raise ValueError(f"{name} must be {allowed}; got {value}")


@dataclass(frozen=True, kw_only=True)
class JBUTrainingConfig:
    """Settings of a training run. Defaults are upstream's, unless marked as ours.

    Attributes:
        backbones: Backbones to train with, by name, or ``NAME=FILE`` with weights from a file.
            Each step draws one. A name given twice is drawn twice as often.
        steps: Optimiser steps.
        batch: Photographs per step.
        parts: Number of parts of a batch. One process computes them in turn, to save memory.
            Processes of torchrun share them; their number must divide the parts (not in FeatUp).
        image_size: Side of the crops, in pixels; with other shapes, the root of their area.
        max_aspect: Largest ratio of a crop's longer side to its shorter one (ours; 1: squares, as
            upstream).
        max_stride: Crops are enlarged or reduced by up to this factor for the backbone, so that the
            stages also learn other strides (ours; 1: never, as upstream).
        min_scale: Smallest area of a crop, as a share of the largest crop that fits into the
            photograph (not in FeatUp).
        views: Jittered views per photograph.
        max_pad: Pixels by which a view may reach beyond the crop.
        max_zoom: Largest magnification of a view.
        downsampler: Maps features at image resolution to the backbone's: "attention", whose
            weights depend on the features, or "simple", one blur kernel.
        projection_dim: Channels in which features are compared.
        uncertainty: Whether to predict the standard deviation of the error at each position.
        crf_weight: Weight of the conditional random field.
        crf_samples: Number of pixels that the random field compares.
        tv_weight: Weight of the total variation of magnitudes.
        region_weight: Weight of restoring synthetic piecewise constant features, see
            :mod:`featup_hub.training.synthetic_regions` (not in FeatUp).
        region_field: Largest share of smooth random fields in the regions' variance. Each batch
            draws its share uniformly from 0 to this (not in FeatUp).
        region_noise: Largest standard deviation of the noise added to the regions' source of unit
            deviation. Each batch draws it uniformly from 0 to this (not in FeatUp).
        region_channels: Length of a region's random vector.
        lr: Peak learning rate of NAdam.
        final_lr: Share of ``lr`` at the end of the cosine schedule (FeatUp: constant).
        warmup: Steps of linear warm-up (FeatUp clips at 1e-4 for ten steps).
        max_grad_norm: Norm to which gradients are clipped (not in FeatUp).
        ema: Decay of the exported running mean of weights; 0 exports the last weights (not in
            FeatUp).
        dropout: Probability of dropping a hidden channel of a stage (upstream: 0.1).
        unit_sum: Whether every kernel sums to exactly one, so that features keep their scale
            (not in FeatUp).
        start: Stages to start from: a weights file, or a shipped upsampler, ``jbu_denoise`` or
            ``jbu_faithful``. A joint bilateral stage in them is kept. Empty: new stages, without a
            joint bilateral stage.
        seed: Seed of all random numbers.
        checkpoint_minutes: Longest time between checkpoints.
        device: Where to compute.

    Raises:
        ValueError: If a value is unknown, not finite, or out of its range.
    """

    backbones: tuple[str, ...] = ("efficientnet_lite0",)
    steps: int = 2000
    batch: int = 4
    parts: int = 1
    image_size: int = 224
    max_aspect: float = 1.0
    max_stride: float = 1.0
    min_scale: float = 0.4
    views: int = 5
    max_pad: int = 20
    max_zoom: float = 2.0
    downsampler: Literal["attention", "simple"] = "attention"
    projection_dim: int = 30
    uncertainty: bool = True
    crf_weight: float = 0.001
    crf_samples: int = 1000
    tv_weight: float = 0.0
    region_weight: float = 0.0
    region_field: float = 0.0
    region_noise: float = 0.0
    region_channels: int = 8
    lr: float = 1e-3
    final_lr: float = 0.02
    warmup: int = 20
    max_grad_norm: float = 1.0
    ema: float = 0.99
    dropout: float = 0.0
    unit_sum: bool = True
    start: str = ""
    seed: int = 0
    checkpoint_minutes: float = 5.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check(self, _TRAINING_RANGES, downsampler=("attention", "simple"))

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then a cosine to ``final_lr``."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * fall)

    def without_folders(self) -> dict[str, object]:
        """Returns the fields for a file to share: this machine's folders mean nothing elsewhere."""
        backbones = [_without_folder(name) for name in self.backbones]
        return {**asdict(self), "backbones": backbones, "start": _without_folder(self.start)}


def _without_folder(name: str) -> str:
    """Shortens ``FILE`` and ``NAME=FILE`` to the file's own name."""
    before, equals, file = name.rpartition("=")
    return before + equals + Path(file).name


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        method: "least-squares" solves for the features exactly; "network" trains FeatUp's
            coordinate network.
        views: Views to fit, including the image itself.
        held_out: Further views that are not fitted. They measure the error, and choose the ridge of
            least squares.
        max_pad: Pixels by which a view may reach beyond the image.
        max_zoom: Largest magnification of a view.
        seed: Seed of all random numbers.
        steps: Optimiser steps of the network.
        batch: Views per step of the network.
        components: Largest number of principal components that the network fits.
        lr: Learning rate of the network.

    Raises:
        ValueError: If a value is unknown, not finite, or out of its range.
    """

    method: Literal["least-squares", "network"] = "least-squares"
    views: int = 100
    held_out: int = 12
    max_pad: int = 30
    max_zoom: float = 1.8
    seed: int = 0
    steps: int = 1200
    batch: int = 10
    components: int = 128
    lr: float = 2e-3

    def __post_init__(self) -> None:
        _check(self, _FIT_RANGES, method=("least-squares", "network"))


PRESETS: Mapping[str, FitConfig] = MappingProxyType(
    {"fast": FitConfig(), "upstream": FitConfig(method="network", views=3000)}
)
"""Configurations by name: the exact fit, and the network with upstream's settings."""
