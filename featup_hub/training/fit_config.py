"""The configuration of a fit. The command line has a flag for each field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["BASIS", "PRESETS", "FitConfig"]

BASIS = "jbu_faithful"  # the views are averaged anyway, so averaging stages add nothing

_LEAST = {"views": 1, "held_out": 1, "max_pad": 0, "max_zoom": 1, "steps": 1, "batch": 1}


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
        if self.method not in ("least-squares", "network"):
            raise ValueError(f"method must be 'least-squares' or 'network'; got {self.method!r}")
        for name, least in {**_LEAST, "components": 1, "lr": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and at least {least}; got {getattr(self, name)}"
                )


PRESETS: Mapping[str, FitConfig] = MappingProxyType(
    {"fast": FitConfig(), "upstream": FitConfig(method="network", views=3000)}
)
"""Configurations by name: the exact fit, and the network with upstream's settings."""
