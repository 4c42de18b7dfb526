r"""One-dimensional tables that combine resizing and border reflection with the taps.

A stage resizes its source bicubically, pads it by reflection and filters it with D×D taps. Along
one axis, tap t of output pixel x therefore reads :math:`\sum_m A_{x,t,m}\, source_m` with at most
four source pixels m, all in a short window around x. A is tabulated once per size. The three steps
are then one filter on the source, for any ratio of sizes, including borders.

Source: bicubic as PyTorch's ``interpolate`` (Keys 1981, a = -0.75, ``align_corners=False``).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BICUBIC_A = -0.75


class FoldedAxis(NamedTuple):
    """One axis of a stage; its output is split into tiles, each with one window of the source."""

    tile: int  # output pixels of a tile; the last tile may reach beyond the output
    window: int  # source pixels of a window
    starts: list[int]  # first source pixel of each tile's window; windows lie within the source
    table: Tensor  # weights A, (tiles·tile, D, window); zero beyond the output


def reflect(index: Tensor, size: int) -> Tensor:
    """Mirrors indices into [0, size), as often as needed (NumPy's ``reflect``)."""
    period = max(2 * (size - 1), 1)
    index = index.abs() % period
    return torch.minimum(index, (period - index) % period) if size > 1 else torch.zeros_like(index)


def _cubic(x: Tensor) -> Tensor:
    a = BICUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)


def bicubic(
    size_in: int, size_out: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the four input pixels of each output pixel and their weights, (size_out, 4).

    Positions are rounded as in PyTorch for maps of this dtype. Weights are float64, or of this
    dtype on a ``device``, which may lack float64.
    """
    scale = torch.tensor(size_in, dtype=dtype) / size_out
    position = scale * (torch.arange(size_out, dtype=dtype, device=device) + 0.5) - 0.5
    first = position.floor()
    offsets = torch.arange(-1, 3, device=device)
    between = (position - first).to(torch.float64 if device is None else dtype)
    weights = _cubic((between[:, None] - offsets).abs())
    pixels = (first.long()[:, None] + offsets).clamp(0, size_in - 1)
    return pixels, weights


@functools.lru_cache(64)
def bicubic_matrix(size_in: int, size_out: int) -> Tensor:
    """Returns bicubic resizing along one axis as a matrix, (size_out, size_in), float64."""
    pixels, weights = bicubic(size_in, size_out, torch.float64)
    return torch.zeros(size_out, size_in, dtype=torch.float64).scatter_add_(1, pixels, weights)


@functools.lru_cache(256)
def fold_axis(
    size_in: int, size_out: int, tile: int, radius: int, dtype: torch.dtype, device: torch.device
) -> FoldedAxis:
    """Tabulates the source pixels that the taps of each output pixel read along one axis.

    ``tile`` output pixels share a window; ``radius`` is the reach of the taps in output pixels;
    ``dtype`` is the precision of the maps.
    """
    pixels, weights = bicubic(size_in, size_out, dtype)
    # If the sizes are equal, three of the four weights are zero and need no space in a window.
    pixels = torch.where(weights == 0, pixels[:, 1:2], pixels)
    taps = reflect(torch.arange(size_out)[:, None] + torch.arange(-radius, radius + 1), size_out)
    pixels, weights = pixels[taps].flatten(1), weights[taps].flatten(1)  # (size_out, D·4)
    tiles = -(-size_out // tile)
    owner = torch.arange(size_out) // tile
    low = torch.full((tiles,), size_in).scatter_reduce_(0, owner, pixels.amin(1), "amin")
    high = torch.zeros(tiles, dtype=torch.long).scatter_reduce_(0, owner, pixels.amax(1), "amax")
    window = int((high - low).max()) + 1
    starts = low.clamp(max=size_in - window)
    diameter = 2 * radius + 1
    table = torch.zeros(tiles * tile, diameter * window, dtype=torch.float64)
    tap = torch.arange(diameter).repeat_interleave(4)
    place = tap * window + pixels - starts[owner][:, None]
    table[:size_out].scatter_add_(1, place, weights)
    table = table.view(-1, diameter, window).to(device, dtype)
    return FoldedAxis(tile, window, starts.tolist(), table)
