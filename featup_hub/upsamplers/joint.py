"""A first stage that looks at cells: it smooths them, and helps the learned stage to place them.

The learned stages compare pixels with pixels of one resolution. This one compares a pixel with
whole cells, which is what a source is made of, and so gives a cell's features to the pixels that
look like it; where features change smoothly, the learned stage does better, so the two are
averaged. Before that, cells that look alike are averaged, since upsampling sharpens noise, too.
Kernels come from the image alone and serve every channel, as those of the other stages do.

Source: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, jbu_apply, pool_guidance

__all__ = ["JointBilateralStage", "JointKernels"]

_MIN_VARIANCE = 1e-6  # of a plain cell, where the root has no slope
_MIN_WIDTH = 1e-3  # should training bring a width to nothing


class JointKernels(NamedTuple):
    """Kernels of a first stage; all but the learned ones sum to one in any case.

    Attributes:
        smoothing: One per cell, over cells, (B, D², h, w).
        upsampling: One per pixel, over pixels that have their cell's features, (B, D², H, W).
        learned: One per pixel, over pixels of the resized source, (B, D², H, W).
    """

    smoothing: Tensor
    upsampling: Tensor
    learned: Tensor


class JointBilateralStage(nn.Module):
    r"""Smooths a source, then upsamples it up to about twice its size, beside a learned stage.

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
        share: Share of the upsampling in the output, beside the learned stage's.

    Example:
        >>> stage, image = JointBilateralStage(), torch.randn(1, 3, 64, 96)
        >>> learned = torch.full((1, 49, 8, 12), 1 / 49)
        >>> kernels = stage.kernels(image, (4, 6), learned)
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
        share: float = 0.5,
    ) -> None:
        super().__init__()
        self.radius = radius
        self.smoothing_spatial = nn.Parameter(torch.tensor(smoothing_spatial))
        self.smoothing_range = nn.Parameter(torch.tensor(smoothing_range))
        self.spread = nn.Parameter(torch.tensor(spread))
        self.spatial = nn.Parameter(torch.tensor(spatial))
        self.range = nn.Parameter(torch.tensor(range))
        self.share = nn.Parameter(torch.tensor(share))

    def kernels(self, image: Tensor, source_size: tuple[int, int], learned: Tensor) -> JointKernels:
        """Computes both filters.

        Args:
            image: The image, (B, G, H, W), float32 or better.
            source_size: Height and width of the source.
            learned: Kernels of the learned stage, (B, D², H, W), at the size of the output.

        Returns:
            The kernels, in the image's precision.
        """
        size = (learned.shape[2], learned.shape[3])
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
            learned=learned,
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
        source = jbu_apply(source, kernels.smoothing, impl=impl)
        placed = jbu_apply(_repeat(source, (height, width)), kernels.upsampling, impl=impl)
        learned = jbu_apply(source, kernels.learned, impl=impl)
        return learned + self.share.to(source) * (placed - learned)


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


def _mirrored(x: Tensor, radius: int, axis: int) -> Tensor:
    """Pads an axis by mirror images; PyTorch's own has no gradient that a GPU repeats exactly."""
    last = x.shape[axis] - 1
    place = torch.arange(x.shape[axis] + 2 * radius, device=x.device) - radius
    for _ in range(radius):  # as often as the shortest map demands
        place = last - (last - place.abs()).abs()
    return x.index_select(axis, place.abs().clamp(max=last))


def _kernel(query: Tensor, key: Tensor, radius: int) -> Tensor:
    """Weights the neighbours of every place by what is asked for and what is there."""
    height, width = query.shape[-2:]
    padded = _mirrored(_mirrored(key, radius, 2), radius, 3)
    logits = [
        -0.5 * (query - padded[:, :, y : y + height, x : x + width]).square().sum(1)
        for y in range(2 * radius + 1)
        for x in range(2 * radius + 1)
    ]
    return torch.stack(logits, dim=1).softmax(dim=1)
