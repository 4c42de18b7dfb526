"""Synthetic features with known high-resolution truth, made from photographs without labels.

A photograph is segmented into regions of similar colour, and each region gets a random vector. The
map of vectors is reduced to a backbone's grid; the stages learn to restore it, and so learn where
edges are. The regions are a few extra channels for the same kernels, so this costs almost nothing.

Real features also vary within a region. Smooth random fields added to the vectors teach the stages
to interpolate there and not to blur.

Source: segmentation by Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image Segmentation",
IJCV 2004, as scikit-image implements it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Segmentations from fine to coarse, in the units of the paper's constant k and in pixels.
MIN_SCALE, MAX_SCALE = 60.0, 800.0
MIN_PIXELS, MAX_PIXELS = 30, 120


def random_regions(rgb: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Segments photographs into regions and gives each region a random vector of unit variance.

    Photographs are (B, 3, H, W) in [0, 1], the maps (B, channels, H, W). The generators of this
    module are on the CPU.
    """
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ImportError(
            "training on regions needs scikit-image, which is not installed; "
            'pip install "featup_hub[train]", or set region_weight to 0'
        ) from error
    maps = []
    for photo in rgb.cpu():
        size, fineness = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        labels = felzenszwalb(
            photo.permute(1, 2, 0).mul(255).round().byte().numpy(),
            scale=MIN_SCALE * math.pow(MAX_SCALE / MIN_SCALE, fineness),
            min_size=round(MIN_PIXELS + size * (MAX_PIXELS - MIN_PIXELS)),
        )
        vectors = torch.randn(int(labels.max()) + 1, channels, generator=generator)
        maps.append(vectors[torch.from_numpy(labels)].permute(2, 0, 1))
    return torch.stack(maps).to(rgb)


def random_field(
    grid: tuple[int, int], size: tuple[int, int], count: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Draws smooth maps that the grid resolves, (*count, *size), of mean 0 and variance 1."""
    finest, coarsest = 0.75, 0.25  # nodes per cell; must be below one for the grid to resolve them
    share = coarsest + (finest - coarsest) * torch.rand((), generator=generator).item()
    nodes = [max(round(cells * share), 2) for cells in grid]
    field = torch.randn(*count, nodes[0], nodes[1], generator=generator)
    field = F.interpolate(field, size, mode="bicubic", align_corners=True)
    return (field - field.mean()) / field.std()


def reduce_regions(regions: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Reduces maps to a backbone's grid in one of three ways, at random.

    They are the centre of a cell, its mean, and an antialiased bicubic reduction, which also
    includes neighbouring cells.
    """
    method = int(torch.randint(3, (), generator=generator))
    if method == 0:
        return F.interpolate(regions, size, mode="nearest-exact")
    if method == 1:
        return F.adaptive_avg_pool2d(regions, size)
    return F.interpolate(regions, size, mode="bicubic", antialias=True)
