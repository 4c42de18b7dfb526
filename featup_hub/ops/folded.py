r"""Filtering with one kernel per pixel, as batched matrix products on the low-resolution map.

For a tile of source pixels, every output pixel above it reads the same small window of the
source. With the taps folded onto that window (:mod:`featup_hub.ops.tables`), a tile is one
matrix product, (output pixels × window) · (window × channels). The three functions here are that
map and its two adjoints:

* :func:`apply`: y = K(k)·s
* :func:`source_gradient`: ds = K(k)ᵀ·dy
* :func:`kernel_gradient`: dk, the correlation of dy with the windows of s

All work on channels-last tensors, (B, H, W, C), in bands of tile rows that bound the memory.
A source of the output's own size is filtered as it is; one of half the size is doubled
bicubically on the way, without ever being formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops.tables import fold_table, reach

__all__ = ["apply", "kernel_gradient", "source_gradient"]

# Elements of the windows gathered per band: large enough to keep the matrix products busy, small
# enough to stay in a CPU's last-level cache.
BAND_ELEMENTS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a map is cut into tiles.

    Attributes:
        scale: Output pixels per source pixel along an axis, 1 or 2.
        height: Source rows of a tile.
        width: Source columns of a tile.
        margin: Source pixels a window extends beyond its tile.
        rows: Tile rows.
        columns: Tile columns.
        table_y: Folding along y, (rows·scale·height, D, window height).
        table_x: Folding along x, (columns·scale·width, D, window width).
    """

    scale: int
    height: int
    width: int
    margin: int
    rows: int
    columns: int
    table_y: Tensor
    table_x: Tensor

    @classmethod
    def plan(cls, source: tuple[int, int], output: tuple[int, int], like: Tensor) -> Tiling:
        """Plans tiles for a source and output size; ``like`` gives D², dtype and device."""
        (h, w), scale = source, output[0] // source[0]
        if output != (scale * h, scale * w) or scale not in (1, 2):
            raise ValueError(
                f"tiles need an output of the source's size or its double; got {output} of {source}"
            )
        radius = round(like.shape[-1] ** 0.5) // 2
        height, width = (2, 8) if scale == 2 else (4, 8)
        return cls(
            scale=scale,
            height=height,
            width=width,
            margin=reach(radius, scale),
            rows=-(-h // height),
            columns=-(-w // width),
            table_y=fold_table(h, scale, height, radius).to(like),
            table_x=fold_table(w, scale, width, radius).to(like),
        )

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of a window in source pixels."""
        return self.height + 2 * self.margin, self.width + 2 * self.margin

    @property
    def area(self) -> int:
        """Output pixels of a tile."""
        return self.scale**2 * self.height * self.width

    def pad(self, source: Tensor) -> Tensor:
        """Surrounds (B, h, w, C) by the zeros that windows at the border reach into."""
        bottom = self.rows * self.height - source.shape[1] + self.margin
        right = self.columns * self.width - source.shape[2] + self.margin
        return F.pad(source, (0, 0, self.margin, right, self.margin, bottom))

    def buffer(self, rows: int, channels: int, like: Tensor) -> Tensor:
        """Returns memory for a band; one per call, fresh pages cost more than the filter."""
        count = next(self.bands(channels))[1] * self.columns
        return like.new_empty(count, rows, channels)

    def bands(self, channels: int) -> Iterator[tuple[int, int]]:
        """Yields (first tile row, number of tile rows) of each band."""
        window = self.window[0] * self.window[1]
        per_row = self.columns * window * max(channels, window)
        count = max(1, min(self.rows, BAND_ELEMENTS // per_row))
        for first in range(0, self.rows, count):
            yield first, min(count, self.rows - first)

    def gather(self, padded: Tensor, first: int, count: int, out: Tensor) -> Tensor:
        """Copies a band's windows out of one padded map, into (count·columns, window, C)."""
        (wy, wx), (sy, sx, sc) = self.window, padded.stride()
        view = padded.as_strided(
            (count, self.columns, wy, wx, padded.shape[-1]),
            (self.height * sy, self.width * sx, sy, sx, sc),
            padded.storage_offset() + first * self.height * sy,
        )
        windows = out[: count * self.columns]
        windows.view(view.shape).copy_(view)
        return windows

    def fold(self, kernel: Tensor, first: int, count: int) -> Tensor:
        """Folds a band's taps onto the windows.

        Args:
            kernel: Kernels of one sample, (H, W, D²).
            first: First tile row.
            count: Tile rows.

        Returns:
            (count·columns, output pixels of a tile, window).
        """
        (wy, wx), d = self.window, self.table_y.shape[1]
        high, wide = self.scale * self.height, self.scale * self.width
        rows, cols = count * high, self.columns * wide
        band = _rows(kernel, first * high, rows, cols).view(rows, cols, d, d)
        t = band.permute(0, 2, 1, 3).reshape(rows, d, cols * d)
        t = torch.bmm(self.table_y[first * high :][:rows].transpose(1, 2), t)
        t = t.view(rows, wy, cols, d).permute(2, 0, 1, 3).reshape(cols, rows * wy, d)
        t = torch.bmm(t, self.table_x)
        t = t.view(self.columns, wide, count, high, wy, wx).permute(2, 0, 3, 1, 4, 5)
        return t.reshape(count * self.columns, high * wide, wy * wx)

    def unfold(self, folded: Tensor, first: int, count: int) -> Tensor:
        """The adjoint of :meth:`fold`, (rows, columns, D²) of the band, padding included."""
        (wy, wx), d = self.window, self.table_y.shape[1]
        high, wide = self.scale * self.height, self.scale * self.width
        rows, cols = count * high, self.columns * wide
        t = folded.view(count, self.columns, high, wide, wy, wx).permute(1, 3, 0, 2, 4, 5)
        t = torch.bmm(t.reshape(cols, rows * wy, wx), self.table_x.transpose(1, 2))
        t = t.view(cols, rows, wy, d).permute(1, 2, 0, 3).reshape(rows, wy, cols * d)
        t = torch.bmm(self.table_y[first * high :][:rows], t)
        return t.view(rows, d, cols, d).permute(0, 2, 1, 3).reshape(rows, cols, d * d)

    def tiles(self, output: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Cuts a band of (H, W, C) into tiles, (count·columns, output pixels of a tile, C)."""
        high, wide = self.scale * self.height, self.scale * self.width
        band = _rows(output, first * high, count * high, self.columns * wide)
        band = band.view(count, high, self.columns, wide, -1).transpose(1, 2)
        return band.to(dtype).reshape(count * self.columns, high * wide, -1)

    def untile(self, tiles: Tensor, output: Tensor, first: int, count: int) -> None:
        """Writes a band of tiles to where it belongs in (H, W, C)."""
        high, wide = self.scale * self.height, self.scale * self.width
        tiles = tiles.view(count, self.columns, high, wide, -1).transpose(1, 2)
        target = output[first * high :][: count * high]
        if target.shape[:2] == (count * high, self.columns * wide):
            target.view(count, high, self.columns, wide, -1).copy_(tiles)
        else:
            whole = tiles.reshape(count * high, self.columns * wide, -1)
            target.copy_(whole[: target.shape[0], : target.shape[1]])


def apply(source: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Filters a source, doubling it on the way where the kernels are twice its size.

    Args:
        source: (B, h, w, C).
        kernel: (B, H, W, D²), H×W being h×w or 2h×2w; sums have its precision.
        bias: (C,).

    Returns:
        (B, H, W, C) in the source's dtype.
    """
    batch, height, width, _ = kernel.shape
    tiling = Tiling.plan((source.shape[1], source.shape[2]), (height, width), kernel)
    channels = source.shape[3]
    output = source.new_empty(batch, height, width, channels)
    padded = tiling.pad(source)
    window_buffer = tiling.buffer(tiling.window[0] * tiling.window[1], channels, kernel)
    tile_buffer = tiling.buffer(tiling.area, channels, kernel)
    for b in range(batch):
        for first, count in tiling.bands(channels):
            folded = tiling.fold(kernel[b], first, count)
            windows = tiling.gather(padded[b], first, count, window_buffer)
            tiles = torch.bmm(folded, windows, out=tile_buffer[: len(windows)])
            if bias is not None:
                tiles += bias
            tiling.untile(tiles, output[b], first, count)
    return output


def source_gradient(grad: Tensor, kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`apply` in the source.

    Args:
        grad: (B, H, W, C).
        kernel: (B, H, W, D²).
        size: Height and width of the source.

    Returns:
        (B, h, w, C) in the kernels' precision.
    """
    batch, height, width, channels = grad.shape
    tiling = Tiling.plan(size, (height, width), kernel)
    total = tiling.pad(kernel.new_zeros(batch, *size, channels))
    (wy, wx), step = tiling.window, tiling.width
    for b in range(batch):
        for first, count in tiling.bands(channels):
            folded = tiling.fold(kernel[b], first, count)
            tiles = tiling.tiles(grad[b], first, count, kernel.dtype)
            windows = torch.bmm(folded.transpose(1, 2), tiles)
            windows = windows.view(count, tiling.columns, wy, wx, channels)
            sy, sx, sc = total[b].stride()
            for row in range(count):
                target = total[b, (first + row) * tiling.height :]
                # Windows overlap: add them in blocks of a tile's width, which do not.
                for x in range(0, wx, step):
                    block = windows[row, :, :, x : x + step].transpose(0, 1)
                    offset = target.storage_offset() + x * sx
                    target.as_strided(block.shape, (sy, step * sx, sx, sc), offset).add_(block)
    margin = tiling.margin
    return total[:, margin : margin + size[0], margin : margin + size[1]]


def kernel_gradient(grad: Tensor, source: Tensor, diameter: int, dtype: torch.dtype) -> Tensor:
    """The adjoint of :func:`apply` in the kernels.

    Args:
        grad: (B, H, W, C).
        source: (B, h, w, C).
        diameter: Side D of the kernels.
        dtype: Precision of the kernels.

    Returns:
        (B, H, W, D²).
    """
    batch, height, width, channels = grad.shape
    output = grad.new_empty(batch, height, width, diameter * diameter, dtype=dtype)
    tiling = Tiling.plan((source.shape[1], source.shape[2]), (height, width), output)
    padded = tiling.pad(source)
    window_buffer = tiling.buffer(tiling.window[0] * tiling.window[1], channels, output)
    high = tiling.scale * tiling.height
    for b in range(batch):
        for first, count in tiling.bands(channels):
            tiles = tiling.tiles(grad[b], first, count, dtype)
            windows = tiling.gather(padded[b], first, count, window_buffer)
            folded = torch.bmm(tiles, windows.transpose(1, 2))
            target = output[b, first * high :][: count * high]
            band = tiling.unfold(folded, first, count)
            target.copy_(band[: target.shape[0], :width])
    return output


def _rows(x: Tensor, first: int, count: int, width: int) -> Tensor:
    """Returns rows of (H, W, C), with zeros where they lie beyond the map."""
    band = x[first : first + count]
    if band.shape[:2] == (count, width):
        return band
    return F.pad(band, (0, 0, 0, width - band.shape[1], 0, count - band.shape[0]))
