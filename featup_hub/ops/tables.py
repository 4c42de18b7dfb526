r"""One-dimensional tables that fold resizing and border reflection into the taps.

A stage resizes its source bicubically, pads it by reflection and filters it with D×D taps. Along
one axis, tap i of output pixel x therefore reads :math:`\sum_m A_{x,i,m}\, source_m` with at most
four low-resolution pixels m, all within a short window around x. Tabulating A once per size makes
the whole chain one adaptive filter on the low-resolution map, borders included, exactly.

Source: bicubic as PyTorch's ``interpolate`` (Keys 1981, a = -0.75, ``align_corners=False``).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["bicubic_matrix", "fold_table", "reach", "reflect"]

BICUBIC_A = -0.75


def reflect(index: int, size: int) -> int:
    """Mirrors an index into [0, size), as often as needed (NumPy's ``reflect``)."""
    if size == 1:
        return 0
    index = abs(index) % (2 * (size - 1))
    return min(index, 2 * (size - 1) - index)


def bicubic_row(index: int, size_in: int, size_out: int) -> dict[int, float]:
    """Returns the input pixels that output pixel ``index`` mixes, with their weights."""
    position = (index + 0.5) * size_in / size_out - 0.5
    first = math.floor(position)
    row: dict[int, float] = {}
    for offset in (-1, 0, 1, 2):
        pixel = min(max(first + offset, 0), size_in - 1)
        row[pixel] = row.get(pixel, 0.0) + _cubic(abs(position - first - offset))
    return row


def _cubic(x: float) -> float:
    a = BICUBIC_A
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a


@functools.lru_cache(64)
def bicubic_matrix(size_in: int, size_out: int) -> Tensor:
    """Returns bicubic resizing along one axis as a matrix, (size_out, size_in), float64."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for index in range(size_out):
        for pixel, weight in bicubic_row(index, size_in, size_out).items():
            matrix[index, pixel] += weight
    return matrix


def reach(radius: int, scale: int) -> int:
    """Low-resolution pixels that the taps of one output pixel see to either side."""
    return radius if scale == 1 else radius // 2 + 2


@functools.lru_cache(128)
def fold_table(size: int, scale: int, tile: int, radius: int) -> Tensor:
    """Tabulates which source pixels the taps of each output pixel read along one axis.

    ``tile`` source pixels, and the ``scale · tile`` output pixels above them, share one window
    that begins ``reach`` pixels before the tile.

    Args:
        size: Source pixels n.
        scale: 1 (taps reflect at the border, nothing is resized) or 2 (doubled bicubically).
        tile: Source pixels that share a window.
        radius: Reach of the taps, in output pixels.

    Returns:
        Weights, (N, D, tile + 2·reach), float64; N = scale·n rounded up to whole tiles, the
        rows beyond scale·n zero.
    """
    output, margin = scale * size, reach(radius, scale)
    rows = -(-size // tile) * scale * tile
    table = torch.zeros(rows, 2 * radius + 1, tile + 2 * margin, dtype=torch.float64)
    for x in range(output):
        start = x // (scale * tile) * tile - margin
        for tap in range(2 * radius + 1):
            mirrored = reflect(x + tap - radius, output)
            for pixel, weight in bicubic_row(mirrored, size, output).items():
                if weight:
                    table[x, tap, pixel - start] += weight
    return table
