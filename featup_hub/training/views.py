"""Views of an image: small random transforms, and sampling a map at a view's positions.

A jitter is upstream's transform of an image (reflect-pad, sometimes zoom, crop at a random offset,
sometimes flip), stored as the part of the image that the view shows. It has no resolution, so one
jitter transforms an image and its feature maps of any stride consistently.

Sampling runs along rows, then along columns, with ``index_select``. The backward passes of
``grid_sample`` and ``interpolate`` add gradients in the order in which a GPU's threads arrive, and
``torch.use_deterministic_algorithms`` refuses them.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3; distributions agree
with mhamilton723/FeatUp @ 6b5a6c0 (MIT). Upstream mirrors a map at the centres of its outermost
pixels. This module mirrors at the edge, which has the same position at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 2**24  # of a pixel; rounding removes float64 errors from whole pixels


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Which part of an image a view shows, in fractions of the image's height and width.

    A view's point (y, x), both in [0, 1], shows the image's point (top + y/zoom, left + x/zoom),
    with x counted from the right in a flipped view. Outside [0, 1] the image is mirrored.
    """

    top: float = 0.0  # upper edge of the part shown
    left: float = 0.0  # its left edge
    zoom: float = 1.0  # magnification, at least 1
    flip: bool = False  # whether the view is mirrored left to right


def sample_jitter(
    size: tuple[int, int],
    *,
    max_pad: int = 20,
    max_zoom: float = 2.0,
    generator: torch.Generator | None = None,
) -> Jitter:
    """Draws a jitter: pad, zoom with probability ½ by U(1, max_zoom), crop anywhere, flip with ½.

    ``size`` is the image's, in pixels; up to ``max_pad`` are added on every side before cropping.
    Without zoom the offset is a whole number of pixels, so that the view is a pure crop.
    """
    zooms, amount, down, right, flip = torch.rand(
        5, generator=generator, dtype=torch.float64
    ).tolist()
    zoom = 1 + amount * (max_zoom - 1) if zooms < 0.5 else 1.0
    corner = []
    for pixels, draw in zip(size, (down, right), strict=True):
        slack = (pixels + 2 * max_pad) * zoom - pixels
        offset = draw * slack if zoom > 1 else int(draw * (slack + 1))
        corner.append((offset / zoom - max_pad) / pixels)
    return Jitter(top=corner[0], left=corner[1], zoom=zoom, flip=flip < 0.5)


def apply_jitter(x: Tensor, jitters: Sequence[Jitter]) -> Tensor:
    """Transforms maps, (B, C, H, W), by one jitter each, with bilinear sampling.

    Returns ``x`` itself where every jitter is the identity.
    """
    if all(jitter == Jitter() for jitter in jitters):
        return x
    at = centres(x.shape[-2]), centres(x.shape[-1])
    return torch.cat(
        [sample_map(one, *positions(j, *at)) for one, j in zip(x.split(1), jitters, strict=True)]
    )


def centres(count: int) -> Tensor:
    """Returns the centres of ``count`` pixels along an axis, in fractions of it, float64."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def positions(jitter: Jitter, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where rows, (M,), and columns, (N,), of a view lie in the image.

    All are float64, in fractions of the view's, and of the image's, height and width.
    """
    if jitter.flip:
        columns = 1 - columns
    return _mirror(jitter.top + rows / jitter.zoom), _mirror(jitter.left + columns / jitter.zoom)


def _mirror(fractions: Tensor) -> Tensor:
    """Mirrors positions at 0 and 1 into [0, 1]."""
    around = fractions.abs() % 2
    return torch.minimum(around, 2 - around)


def sample_map(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolates maps bilinearly at every crossing, (B, C, H, W) -> (B, C, M, N).

    Rows, (M,), and columns, (N,), are fractions of height and width, float64 on the CPU: pixel i
    has its centre at (i + ½) / H. Borders are repeated.
    """
    return _sample_axis(_sample_axis(x, rows, 2), columns, 3)


def _sample_axis(x: Tensor, fractions: Tensor, axis: int) -> Tensor:
    """Interpolates linearly between the centres of neighbouring pixels along an axis."""
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
