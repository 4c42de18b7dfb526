"""A first stage nobody trains: cells are smoothed, then upsampled by a joint bilateral filter.

The learned stages compare pixels with pixels of one resolution. This one compares a pixel with
whole cells, which is what a source is made of, and so gives a cell's features to the pixels that
look like it; and before that it averages cells that look alike, since upsampling sharpens noise,
too. Kernels come from the image alone and serve every channel, as those of the other stages do.

Source: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, jbu_apply, pool_guidance
from featup_hub.ops.reference import reflect_pad

__all__ = ["JointBilateralStage", "JointKernels"]

_MIN_VARIANCE = 1e-6  # of a plain cell, where the root has no slope
_MIN_WIDTH = 1e-3  # should training bring a width to nothing


class JointKernels(NamedTuple):
    """Kernels of a first stage, which sum to one.

    Attributes:
        smoothing: One per cell, over cells, (B, D², h, w).
        upsampling: One per pixel, over pixels that have their cell's features, (B, D², H, W).
    """

    smoothing: Tensor
    upsampling: Tensor


class JointBilateralStage(nn.Module):
    r"""Smooths a source, then upsamples it up to about twice its size.

    Both filters weight what lies and looks near, :math:`w_{pq} \propto \exp(-|a_p - b_q|^2 / 2)`,
    normalised over the neighbourhood. Smoothing sets :math:`a = b` = (place / σ, mean colour / ρ,
    spread · deviation / ρ) of cells, the deviation so that a cell that an edge crosses keeps to
    itself. Upsampling compares a pixel's (place / σ, colour / ρ) with those of its neighbours'
    cells. Places are in cells, colours in units of the normalised image.

    Args:
        radius: Reach of both filters, in cells and in pixels of the output.
        smoothing_spatial: σ of the smoothing: its strength.
        smoothing_range: ρ of the smoothing.
        spread: Weight of the deviation.
        spatial: σ of the upsampling.
        range: ρ of the upsampling.

    Example:
        >>> stage, image = JointBilateralStage(), torch.randn(1, 3, 64, 96)
        >>> kernels = stage.kernels(image, (4, 6), (8, 12))
        >>> stage(torch.randn(1, 5, 4, 6), kernels).shape
        torch.Size([1, 5, 8, 12])
    """

    def __init__(
        self,
        radius: int = 3,
        *,
        smoothing_spatial: float = 0.7,
        smoothing_range: float = 0.25,
        spread: float = 1.0,
        spatial: float = 0.5,
        range: float = 0.25,
    ) -> None:
        super().__init__()
        self.radius = radius
        self.smoothing_spatial = nn.Parameter(torch.tensor(smoothing_spatial))
        self.smoothing_range = nn.Parameter(torch.tensor(smoothing_range))
        self.spread = nn.Parameter(torch.tensor(spread))
        self.spatial = nn.Parameter(torch.tensor(spatial))
        self.range = nn.Parameter(torch.tensor(range))

    def kernels(
        self, image: Tensor, source_size: tuple[int, int], size: tuple[int, int]
    ) -> JointKernels:
        """Computes both filters.

        Args:
            image: The image, (B, G, H, W), float32 or better.
            source_size: Height and width of the source.
            size: Height and width of the stage's output.

        Returns:
            The kernels, in the image's precision.
        """
        cells = pool_guidance(image, source_size)
        variance = pool_guidance(image.square(), source_size) - cells.square()
        deviation = variance.clamp(min=_MIN_VARIANCE).sqrt()
        looks = torch.cat([cells, self.spread.to(image) * deviation], dim=1)
        near, alike = _width(self.smoothing_spatial, image), _width(self.smoothing_range, image)
        own = torch.cat([_places(source_size, source_size, image) / near, looks / alike], dim=1)

        near, alike = _width(self.spatial, image), _width(self.range, image)
        pixels = [_places(source_size, size, image) / near, pool_guidance(image, size) / alike]
        places = _places(source_size, source_size, image)
        theirs = _repeat(torch.cat([places / near, cells / alike], dim=1), size)
        return JointKernels(
            smoothing=_kernel(own, own, self.radius),
            upsampling=_kernel(torch.cat(pixels, dim=1), theirs, self.radius),
        )

    def forward(
        self, source: Tensor, kernels: JointKernels, *, impl: Implementation = "auto"
    ) -> Tensor:
        """Applies the kernels.

        Args:
            source: Features, (B, C, h, w).
            kernels: From :meth:`kernels`.
            impl: Who computes, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features at the size that the kernels were computed for, (B, C, H, W).
        """
        height, width = kernels.upsampling.shape[-2:]
        source = _repeat(jbu_apply(source, kernels.smoothing, impl=impl), (height, width))
        return jbu_apply(source, kernels.upsampling, impl=impl)


def _width(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like).abs().clamp(min=_MIN_WIDTH)


def _places(source_size: tuple[int, int], size: tuple[int, int], image: Tensor) -> Tensor:
    """Returns the rows and columns of pixels on the source's grid, (B, 2, *size)."""
    # Shapes, not lengths, and products before quotients, so that symbolic sizes stay symbolic.
    rows, columns = (
        (torch.arange(count, device=image.device) + 0.5).to(image) * cells / count
        for cells, count in zip(source_size, size, strict=True)
    )
    height, width = size
    grid = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])
    return grid.expand(image.shape[0], -1, -1, -1)


def _repeat(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Gives every pixel its cell's value, (B, C, h, w) -> (B, C, *size)."""
    for axis, count in zip((2, 3), size, strict=True):
        pixel = torch.arange(count, device=cells.device)
        cells = cells.index_select(axis, (2 * pixel + 1) * cells.shape[axis] // (2 * count))
    return cells


def _kernel(query: Tensor, key: Tensor, radius: int) -> Tensor:
    """Weights the neighbours of every place by what is asked for and what is there."""
    height, width = query.shape[-2:]
    padded = reflect_pad(key, radius)
    logits = [
        -0.5 * (query - padded[:, :, y : y + height, x : x + width]).square().sum(1)
        for y in range(2 * radius + 1)
        for x in range(2 * radius + 1)
    ]
    return torch.stack(logits, dim=1).softmax(dim=1)
