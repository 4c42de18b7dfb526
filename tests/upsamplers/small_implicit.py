"""A small implicit upsampler, the same one every time."""

from __future__ import annotations

import torch

from featup_hub import ImplicitUpsampler


def make(height: int = 9, width: int = 13, **options) -> ImplicitUpsampler:
    draw = torch.Generator().manual_seed(3)
    return ImplicitUpsampler(
        torch.randn(1, 3, height, width, generator=draw),
        torch.randn(7, generator=draw),
        torch.randn(7, 4, generator=draw),
        **{"frequencies": 3, "log_range": (-1.0, 2.0), "hidden": 8, **options},
    ).eval()
