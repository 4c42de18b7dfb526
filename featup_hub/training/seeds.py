"""Random generators seeded by a few numbers, so that resuming needs no stored state."""

from __future__ import annotations

import torch


def seeded(*numbers: int) -> torch.Generator:
    """Returns a CPU generator seeded by all the numbers, each below 2⁶³."""
    state = 0
    for number in numbers:
        # splitmix64: neighbouring seeds and steps give unrelated streams.
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)
