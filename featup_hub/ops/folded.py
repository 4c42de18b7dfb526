r"""Filtering with one kernel per pixel, as batched matrix products on the source.

All output pixels of a tile read the same small window of the source. The taps are folded onto that
window (:mod:`featup_hub.ops.tables`). A tile is then one matrix product, (output pixels × window) ·
(window × channels). The three functions here are this map and its two adjoints:

* :func:`apply`: y = K(k)·s
* :func:`source_gradient`: ds = K(k)ᵀ·dy
* :func:`kernel_gradient`: dk, the correlation of dy with the windows of s

All work on channels-last tensors, (B, H, W, C), row of tiles by row of tiles, to bound memory. The
output may have any size. The taps include the bicubic resizing, so the resized source is never
stored. Pixels within a tile are in column-major order, the layout that the product needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops.memory import new_map, temporary_elements
from featup_hub.ops.tables import FoldedAxis, fold_axis

__all__ = ["apply", "kernel_gradient", "source_gradient"]

TILE_HEIGHT, TILE_WIDTH = 4, 8


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a map is split into tiles.

    Attributes:
        source: Height and width of the source.
        output: Height and width of the output.
        y: The vertical axis.
        x: The horizontal axis.
        window: Positions of the pixels of a row's windows, counted from the first window's row,
            (columns, window height, window width).
    """

    source: tuple[int, int]
    output: tuple[int, int]
    y: FoldedAxis
    x: FoldedAxis
    window: Tensor

    @classmethod
    def plan(cls, source: tuple[int, int], output: tuple[int, int], like: Tensor) -> Tiling:
        """Plans tiles for a source and output size; ``like`` gives D², dtype and device."""
        radius = round(like.shape[-1] ** 0.5) // 2
        y, x = (
            fold_axis(size_in, size_out, tile, radius, like.dtype, like.device)
            for size_in, size_out, tile in zip(
                source, output, (TILE_HEIGHT, TILE_WIDTH), strict=True
            )
        )
        rows = source[1] * torch.arange(y.window)[:, None]
        columns = torch.tensor(x.starts)[:, None, None] + torch.arange(x.window)
        return cls(source=source, output=output, y=y, x=x, window=(rows + columns).to(like.device))

    @property
    def columns(self) -> int:
        """Tiles of a row."""
        return len(self.x.starts)

    @property
    def area(self) -> int:
        """Source pixels of a window."""
        return self.y.window * self.x.window

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Yields number, first output row and end row (exclusive) of every row of tiles."""
        for row in range(len(self.y.starts)):
            first = row * self.y.tile
            yield row, first, min(first + self.y.tile, self.output[0])

    def parts(self, channels: int) -> Iterator[slice]:
        """Yields groups of tiles of a row; one product computes a group."""
        elements = temporary_elements(self.window.device)
        count = max(1, elements // (self.area * max(channels, 1)))
        for first in range(0, self.columns, count):
            yield slice(first, min(first + count, self.columns))

    def buffers(self, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns memory for windows and tiles; new memory costs more than the products."""
        count = next(self.parts(channels)).stop
        return (
            like.new_empty(count * self.area, channels),
            like.new_empty(count, self.x.tile * self.y.tile, channels),
        )

    def pixels(self, row: int) -> Tensor:
        """Returns the source pixels in the windows of a row of tiles, (columns, area)."""
        return (self.window + self.y.starts[row] * self.source[1]).flatten(1)

    def fold_buffers(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns memory for :meth:`fold`; the first buffer is zero."""
        height, width, d = self.y.tile, self.columns * self.x.tile, self.x.table.shape[1]
        return (
            like.new_zeros(height, d, width, d),
            like.new_empty(height, self.y.window, width * d),
            like.new_empty(width, height * self.y.window, self.x.window),
        )

    def fold(
        self, kernel: Tensor, first: int, stop: int, buffers: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Folds the taps of a row of tiles onto the windows.

        Takes the kernels of one sample, (H, W, D²), and those of its rows that the tiles hold.
        Returns (columns, output pixels of a tile, source pixels of a window), in the last buffer.
        """
        taps, down, across = buffers
        height, d = taps.shape[:2]
        rows = kernel[first:stop].unflatten(2, (d, d)).transpose(1, 2)
        taps[: stop - first, :, : kernel.shape[1]] = rows
        if stop - first < height:
            taps[stop - first :] = 0
        table = self.y.table[first : first + height].transpose(1, 2)
        torch.bmm(table, taps.view(height, d, -1), out=down)
        torch.bmm(down.view(across.shape[1], -1, d).transpose(0, 1), self.x.table, out=across)
        return across.view(self.columns, -1, self.area)

    def unfold(self, folded: Tensor, first: int) -> Tensor:
        """The adjoint of :meth:`fold`, (tile height, columns·tile width, D²)."""
        height, d = self.y.tile, self.x.table.shape[1]
        across = folded.reshape(-1, height * self.y.window, self.x.window)
        down = torch.bmm(across, self.x.table.transpose(1, 2)).transpose(0, 1)
        taps = torch.bmm(
            self.y.table[first : first + height], down.reshape(height, self.y.window, -1)
        )
        return taps.view(height, d, -1, d).transpose(1, 2).flatten(2)

    def cut(self, output: Tensor, first: int, stop: int, part: slice, out: Tensor) -> Tensor:
        """Copies tiles out of (H, W, C), zero beyond it, into (tiles, output pixels, C)."""
        width, tiles = self.x.tile, out[: part.stop - part.start]
        band = output[first:stop, part.start * width : part.stop * width]
        view = tiles.view(-1, width, self.y.tile, output.shape[-1])
        if band.shape[:2] == (self.y.tile, len(tiles) * width):
            view.copy_(band.view(self.y.tile, -1, width, output.shape[-1]).permute(1, 2, 0, 3))
        else:
            flat = view.flatten(0, 1).zero_()
            flat[: band.shape[1], : band.shape[0]] = band.transpose(0, 1)
        return tiles

    def paste(self, tiles: Tensor, output: Tensor, first: int, stop: int, part: slice) -> None:
        """Writes tiles to their positions in (H, W, C)."""
        width = self.x.tile
        band = output[first:stop, part.start * width : part.stop * width]
        pixels = tiles.view(-1, self.y.tile, tiles.shape[-1]).transpose(0, 1)
        band.copy_(pixels[: band.shape[0], : band.shape[1]])


def apply(source: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Resizes a source, (B, h, w, C), to the kernels' size and filters it.

    Sums have the precision of the kernels, (B, H, W, D²); the result, (B, H, W, C), the source's.
    """
    batch, height, width, _ = kernel.shape
    channels = source.shape[3]
    tiling = Tiling.plan((source.shape[1], source.shape[2]), (height, width), kernel)
    output = new_map(source, batch, height, width, channels)
    flat = source.to(kernel.dtype).reshape(batch, -1, channels)
    window_buffer, tile_buffer = tiling.buffers(channels, kernel)
    fold_buffers = tiling.fold_buffers(kernel)
    for row, first, stop in tiling.rows():
        pixels = tiling.pixels(row)
        for b in range(batch):
            folded = tiling.fold(kernel[b], first, stop, fold_buffers)
            for part in tiling.parts(channels):
                windows = _gather(flat[b], pixels[part], window_buffer)
                tiles = torch.bmm(folded[part], windows, out=tile_buffer[: len(windows)])
                if bias is not None:
                    tiles += bias
                tiling.paste(tiles, output[b], first, stop, part)
    return output


def source_gradient(grad: Tensor, kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`apply` with respect to the source, in the kernels' precision."""
    batch, height, width, channels = grad.shape
    tiling = Tiling.plan(size, (height, width), kernel)
    total = new_map(kernel, batch, *size, channels).zero_()
    window_buffer, tile_buffer = tiling.buffers(channels, kernel)
    fold_buffers = tiling.fold_buffers(kernel)
    sums = [_Overlap(tiling, part) for part in tiling.parts(channels)]
    for row, first, stop in tiling.rows():
        top = tiling.y.starts[row]
        for b in range(batch):
            folded = tiling.fold(kernel[b], first, stop, fold_buffers)
            for part, overlap in zip(tiling.parts(channels), sums, strict=True):
                tiles = tiling.cut(grad[b], first, stop, part, tile_buffer)
                windows = window_buffer[: len(tiles) * tiling.area].view(len(tiles), -1, channels)
                torch.bmm(folded[part].transpose(1, 2), tiles, out=windows)
                overlap.add(windows, total[b, top : top + tiling.y.window])
    return total


def kernel_gradient(grad: Tensor, source: Tensor, diameter: int, dtype: torch.dtype) -> Tensor:
    """The adjoint of :func:`apply` with respect to D×D kernels, in the precision ``dtype``."""
    batch, height, width, channels = grad.shape
    output = new_map(grad.new_empty(0, dtype=dtype), batch, height, width, diameter * diameter)
    tiling = Tiling.plan((source.shape[1], source.shape[2]), (height, width), output)
    flat = source.to(dtype).reshape(batch, -1, channels)
    window_buffer, tile_buffer = tiling.buffers(channels, output)
    folded = output.new_empty(tiling.columns, tile_buffer.shape[1], tiling.area)
    for row, first, stop in tiling.rows():
        pixels = tiling.pixels(row)
        for b in range(batch):
            for part in tiling.parts(channels):
                tiles = tiling.cut(grad[b], first, stop, part, tile_buffer)
                windows = _gather(flat[b], pixels[part], window_buffer)
                torch.bmm(tiles, windows.transpose(1, 2), out=folded[part])
            output[b, first:stop] = tiling.unfold(folded, first)[: stop - first, :width]
    return output


class _Overlap:
    """Adds up overlapping windows of a part's neighbouring tiles, always in the same order."""

    def __init__(self, tiling: Tiling, part: slice) -> None:
        device, width = tiling.window.device, tiling.x.window
        starts = torch.tensor(tiling.x.starts[part])
        self.left, right = int(starts[0]), int(starts[-1]) + width
        # For every source column: the tiles whose windows contain it, and its column in them.
        column = torch.arange(self.left, right)[:, None] - starts
        held = (column >= 0) & (column < width)
        tile = held.nonzero()[:, 1]
        rows = torch.arange(tiling.y.window)[:, None] * width
        places = (tile * tiling.area + column[held] + rows).flatten()
        counts = held.sum(1).repeat(tiling.y.window).tolist()
        self.places = places.to(device)
        self.bags = torch.tensor([0, *itertools.accumulate(counts[:-1])], device=device)

    def add(self, windows: Tensor, target: Tensor) -> None:
        """Adds windows, (tiles, area, C), to the rows of the source that they cover."""
        sums = F.embedding_bag(self.places, windows.flatten(0, 1), self.bags, mode="sum")
        sums = sums.view(len(target), -1, target.shape[-1])
        target[:, self.left : self.left + sums.shape[1]] += sums


def _gather(source: Tensor, pixels: Tensor, buffer: Tensor) -> Tensor:
    """Copies windows out of (h·w, C), into (tiles, area, C)."""
    out = buffer[: pixels.numel()]
    torch.index_select(source, 0, pixels.flatten(), out=out)
    return out.view(*pixels.shape, -1)
