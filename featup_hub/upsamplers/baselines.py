r"""Baseline upsamplers: interpolation, and an untrained joint bilateral filter.

All share one signature, ``f(source (B, C, h, w), image (B, 3, H, W), size) -> (B, C, *size)``,
as do all upsamplers in an evaluation. All are linear in the source and treat every channel alike,
so a linear head may be applied before them.

Source: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007, for :func:`joint_bilateral`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import pool_guidance

__all__ = ["bicubic", "bilinear", "joint_bilateral", "nearest"]


def nearest(source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeats every cell; ignores the image."""
    return F.interpolate(source, size, mode="nearest-exact")


def bilinear(source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolates between the four nearest cells; ignores the image."""
    return F.interpolate(source, size, mode="bilinear", align_corners=False)


def bicubic(source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolates between the sixteen nearest cells; ignores the image."""
    return F.interpolate(source, size, mode="bicubic", align_corners=False)


def joint_bilateral(
    source: Tensor,
    image: Tensor,
    size: tuple[int, int],
    *,
    radius: int = 2,
    sigma_spatial: float = 0.75,
    sigma_range: float = 0.5,
) -> Tensor:
    r"""Averages the cells around every pixel, weighted by likeness of colour to the pixel.

    .. math::
        y(u) = \frac{1}{Z} \sum_q s(q)\, e^{-|u_\downarrow - q|^2 / 2\sigma_s^2}\,
               e^{-|I(u) - I_\downarrow(q)|^2 / 2\sigma_r^2}

    :math:`u_\downarrow` is the pixel's position on the source's grid, and :math:`I_\downarrow` is
    the image averaged over each cell. Cells beyond the border are excluded.

    Args:
        source: Low-resolution features, (B, C, h, w).
        image: The image, normalised RGB, (B, 3, H, W).
        size: Height and width wanted.
        radius: Reach in cells.
        sigma_spatial: Width of the Gaussian over distance, in cells.
        sigma_range: Width of the Gaussian over colour, in units of the normalised image.

    Example:
        >>> source, image = torch.ones(1, 2, 2, 2), torch.randn(1, 3, 8, 8)
        >>> joint_bilateral(source, image, (8, 8)).sub(1).abs().max() < 1e-6
        tensor(True)
    """
    guidance = pool_guidance(image, size)
    coarse = pool_guidance(image, (source.shape[-2], source.shape[-1]))
    rows = _neighbours(source.shape[-2], size[0], radius, source)
    columns = _neighbours(source.shape[-1], size[1], radius, source)
    taps = [(row, column) for row in rows for column in columns]

    logits = torch.stack(
        [
            -(guidance - coarse[:, :, y[:, None], x]).square().sum(1) / (2 * sigma_range**2)
            - (dy[:, None] + dx) / (2 * sigma_spatial**2)
            for (y, dy), (x, dx) in taps
        ],
        dim=1,
    )  # (B, D², H, W)
    weights = logits.softmax(1)
    output = source.new_zeros(*source.shape[:2], *size)
    for tap, ((y, _), (x, _)) in enumerate(taps):
        output += weights[:, tap : tap + 1] * source[:, :, y[:, None], x]
    return output


def _neighbours(cells: int, pixels: int, radius: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns each pixel's cell and squared distance per offset; infinite beyond the border."""
    place = (torch.arange(pixels, device=like.device) + 0.5) * (cells / pixels) - 0.5
    centre = place.round().long()
    neighbours = []
    for offset in range(-radius, radius + 1):
        cell = centre + offset
        distance = (place - cell).square().to(like.dtype)
        outside = (cell < 0) | (cell >= cells)
        neighbours.append((cell.clamp(0, cells - 1), distance.masked_fill(outside, torch.inf)))
    return neighbours
