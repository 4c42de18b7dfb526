"""The configuration of a fit. The command line has a flag for each field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["BASIS", "PRESETS", "FitConfig"]

BASIS = "jbu_faithful"  # the views average by themselves, so stages that average add nothing

_LEAST = {"views": 1, "held_out": 1, "max_pad": 0, "max_zoom": 1, "steps": 1, "batch": 1}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """All that decides what a fit finds.

    Attributes:
        method: "least-squares" solves for the features exactly; "network" trains FeatUp's
            coordinate network.
        views: Views of the image to explain, the image itself among them.
        held_out: Further views that are not fitted. They measure the error; least squares also
            choose the ridge by them.
        max_pad: Pixels by which a view may reach beyond the image.
        max_zoom: Largest magnification of a view.
        seed: Decides all that is random.
        steps: Optimiser steps of the network.
        batch: Views per step of the network.
        components: Principal components of the features that the network fits, at most.
        lr: Learning rate of the network.

    Raises:
        ValueError: If a value is none of those named here, not finite, or out of its range.
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
"""Configurations by name: the exact fit, and the network with upstream's numbers."""
