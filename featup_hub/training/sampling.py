"""Linear interpolation along one axis, of operations that a GPU can repeat exactly.

The adjoints of ``grid_sample`` and ``interpolate`` add up gradients in whatever order a GPU's
threads arrive, and are refused under ``torch.use_deterministic_algorithms``. All that training
moves is moved along rows and columns, so two steps along an axis each do the same; the adjoint of
``index_select`` is deterministic where PyTorch is told to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample_axis", "sample_map"]

_STEPS = 2**24  # of a pixel: a whole number of pixels, computed in float64, is one again


def sample_map(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolates bilinearly where rows and columns cross.

    Args:
        x: Maps, (B, C, H, W).
        rows: Positions in fractions of the height, (M,), see :func:`sample_axis`.
        columns: Positions in fractions of the width, (N,).

    Returns:
        Maps, (B, C, M, N).
    """
    return sample_axis(sample_axis(x, rows, 2), columns, 3)


def sample_axis(x: Tensor, fractions: Tensor, axis: int) -> Tensor:
    """Interpolates linearly between the centres of neighbouring pixels; borders are repeated.

    Args:
        x: Any map.
        fractions: Positions in fractions of the axis' length n, (M,), float64 on the CPU: pixel i
            has its centre at (i + ½) / n.
        axis: Along which.

    Returns:
        The map with M positions along the axis.
    """
    n = x.shape[axis]
    position = ((fractions * n - 0.5).clamp(0, n - 1) * _STEPS).round() / _STEPS
    first = position.floor()
    share = (position - first).to(x)
    below = first.long().to(x.device)
    low = x.index_select(axis, below)
    if not (position > first).any():
        return low
    high = x.index_select(axis, (below + 1).clamp(max=n - 1))
    return torch.lerp(low, high, share.reshape(-1, *[1] * (x.dim() - 1 - axis)))
