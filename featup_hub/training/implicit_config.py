"""What the fit of an implicit upsampler is made of; the command line's flags are these fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args, get_type_hints

__all__ = ["PRESETS", "ImplicitConfig"]

_WEIGHTS = ("magnitude_weight", "tv_weight", "blur_weight")
_COUNTS = ("views", "held_out", "components", "pca_views", "frequencies", "hidden", "steps")
_AT_LEAST = {
    0: ("max_pad", "dropout", "seconds", "taps", *_WEIGHTS, "lr", "final_lr", "patience"),
    1: (*_COUNTS, "max_zoom", "batch", "check_every"),
    2: ("patch",),
}


@dataclass(frozen=True, kw_only=True)
class ImplicitConfig:
    """All that decides what a fit learns; the defaults are meant for a CPU, and ours.

    Attributes:
        views: Jittered views of the image to explain.
        held_out: Further views, never fitted, that decide when to stop.
        max_pad: Pixels by which a view may reach beyond the image.
        max_zoom: Largest magnification of a view.
        components: Principal components of the features to fit, at most.
        pca_views: Views they are computed on.
        frequencies: Number of frequencies per signal.
        lowest: Natural logarithm of the lowest frequency.
        highest: Natural logarithm of the highest, in radians per image or per range of colours.
            Above about 6 the network can tell neighbouring pixels and almost equal colours
            apart, which shows as noise.
        hidden: Width of the network.
        base: What the network adds to: "source", the image's own features interpolated
            bilinearly, from which the fit begins; "none", as upstream.
        dropout: Chance that an input of the network is dropped.
        steps: Optimiser steps.
        seconds: Time after which to stop, whatever the steps; 0: none. The result then depends on
            the machine.
        batch: Views per step.
        taps: Side of the grid of random points that stands for a cell of the backbone; the
            network runs at these only. 0 takes every pixel instead: the network runs over the
            whole image once per step, and the map is jittered, as upstream does.
        downsampler: Model of how the backbone makes features, "attention" or "simple".
        uncertainty: Whether to predict where features cannot be explained.
        magnitude_weight: Weight of the features' length.
        tv_weight: Weight of the total variation of the length.
        blur_weight: Weight of what a blur of three pixels would change.
        patch: Side of the random part of the image these three are computed on, in pixels.
        lr: Peak learning rate of NAdam.
        final_lr: Share of it that is left at the end of a cosine.
        check_every: Steps between looks at the held-out views, and between checkpoints.
        patience: Looks without improvement after which to stop; 0: never.
        precision: Of the network's products: "float32", or "bfloat16" by autocast.
        seed: Decides all that is random.

    Raises:
        ValueError: If a value is none of those named here, not finite, or out of its range.
    """

    views: int = 100
    held_out: int = 16
    max_pad: int = 30
    max_zoom: float = 1.8
    components: int = 128
    pca_views: int = 50
    frequencies: int = 16
    lowest: float = -2.0
    highest: float = 5.0
    hidden: int = 128
    base: Literal["source", "none"] = "source"
    dropout: float = 0.1
    steps: int = 200
    seconds: float = 0.0
    batch: int = 4
    taps: int = 3
    downsampler: Literal["attention", "simple"] = "attention"
    uncertainty: bool = True
    magnitude_weight: float = 0.001
    tv_weight: float = 0.05
    blur_weight: float = 0.1
    patch: int = 24
    lr: float = 6e-3
    final_lr: float = 0.02
    check_every: int = 50
    patience: int = 4
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")
            if hint is float and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number; got {value}")
        for least, names in _AT_LEAST.items():
            for name in names:
                if not getattr(self, name) >= least:
                    raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.lowest > self.highest or self.lr == 0 or self.dropout >= 1:
            raise ValueError(
                "a fit needs lowest <= highest, lr > 0 and dropout < 1; got "
                f"lowest={self.lowest}, highest={self.highest}, lr={self.lr}, "
                f"dropout={self.dropout}"
            )

    def learning_rate(self, done: float) -> float:
        """Returns the rate when a share of the run is done: a cosine down to ``final_lr``."""
        fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * fall)


PRESETS: Mapping[str, ImplicitConfig] = MappingProxyType(
    {
        "fast": ImplicitConfig(),
        # Upstream's own numbers; it has no held-out views and stops nowhere.
        "upstream": ImplicitConfig(
            views=3000,
            components=128,
            frequencies=30,
            highest=10.0,
            base="none",
            dropout=0.2,
            steps=1200,
            batch=10,
            taps=0,
            lr=2e-3,
            final_lr=1.0,
            patience=0,
        ),
    }
)
"""Recipes by name."""
