"""The configuration of a training run of JBU stages. The command line has a flag for each field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["JBUTrainingConfig"]

_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a finite number": (
        math.isfinite,  # infinity is allowed: no clipping, no checkpoints between start and end
        (
            *("max_aspect", "max_stride", "max_zoom", "lr", "final_lr"),
            *("crf_weight", "tv_weight", "region_weight", "region_noise"),
        ),
    ),
    "at least 1": (
        lambda value: value >= 1,
        (
            *("steps", "batch", "image_size", "views", "projection_dim", "crf_samples"),
            *("region_channels", "max_aspect", "max_stride", "max_zoom"),
        ),
    ),
    "at least 0": (
        lambda value: value >= 0,
        (
            *("crf_weight", "tv_weight", "region_weight", "region_noise"),
            *("max_pad", "final_lr", "warmup", "checkpoint_minutes"),
        ),
    ),
    "above 0": (lambda value: value > 0, ("lr", "max_grad_norm")),
    "above 0 and at most 1": (lambda value: 0 < value <= 1, ("min_scale",)),
    "from 0 to 1": (lambda value: 0 <= value <= 1, ("region_field", "ema")),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, ("dropout",)),
    "'attention' or 'simple'": (lambda value: value in ("attention", "simple"), ("downsampler",)),
}
"""Allowed values as errors name them, and their fields. The trainer checks ``parts``."""


@dataclass(frozen=True, kw_only=True)
class JBUTrainingConfig:
    """Settings of a training run. Defaults are upstream's, unless marked as ours.

    Attributes:
        backbones: Backbones to train with, by name, or ``NAME=FILE`` with weights from a file.
            Each step draws one. A name given twice is drawn twice as often.
        steps: Optimiser steps.
        batch: Photographs per step.
        parts: Number of parts of a batch. One process computes them in turn, to save memory.
            Processes of torchrun share them; their number must divide the parts (ours).
        image_size: Side of the crops, in pixels; with other shapes, the root of their area.
        max_aspect: Largest ratio of a crop's longer side to its shorter one (ours; 1: squares, as
            upstream).
        max_stride: Crops are enlarged or reduced by up to this factor for the backbone, so that the
            stages also learn other strides (ours; 1: never, as upstream).
        min_scale: Smallest share of a photograph's area in a crop (ours).
        views: Jittered views per photograph.
        max_pad: Pixels by which a view may reach beyond the crop.
        max_zoom: Largest magnification of a view.
        downsampler: Model of how the backbone reduces features: "attention", whose weights depend
            on the features, or "simple", one blur kernel.
        projection_dim: Channels in which features are compared.
        uncertainty: Whether to predict the standard deviation of the error at each position.
        crf_weight: Weight of the conditional random field.
        crf_samples: Number of pixels that the random field compares.
        tv_weight: Weight of the total variation of magnitudes.
        region_weight: Weight of restoring synthetic piecewise constant features, see
            :mod:`featup_hub.training.synthetic_regions` (ours).
        region_field: Largest share of smooth random fields in the regions' variance. Each batch
            draws its share uniformly from 0 to this (ours).
        region_noise: Largest standard deviation of the noise added to the regions' source of unit
            deviation. Each batch draws it uniformly from 0 to this (ours).
        region_channels: Length of a region's random vector.
        lr: Peak learning rate of NAdam.
        final_lr: Share of ``lr`` at the end of the cosine schedule (ours; upstream: constant).
        warmup: Steps of linear warm-up (ours; upstream clips at 1e-4 for ten steps).
        max_grad_norm: Norm to which gradients are clipped (ours).
        ema: Decay of the exported running mean of weights; 0 exports the last weights (ours).
        dropout: Probability of dropping a hidden channel of a stage (upstream: 0.1).
        unit_sum: Whether every kernel sums to exactly one, so that features keep their scale
            (ours).
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
        for allowed, (fits, names) in _ALLOWED.items():
            for name in names:
                if not fits(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {allowed}; got {value!r}")

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then a cosine to ``final_lr``."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * fall)
