"""A joint bilateral first stage: it smooths the source's cells and upsamples them along edges.

The learned stages compare single pixels of one resolution. This stage compares distributions of
colours. Smoothing compares cells with cells and averages cells of one object, because upsampling
also sharpens noise. Upsampling compares a pixel with the cells around it and takes the features of
similar cells. The learned stage is better where features change smoothly, so the outputs of the two
are averaged. Kernels depend only on the image and are the same for every channel, as in the other
stages.

Sources: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007; Smola et al., "A Hilbert Space
Embedding for Distributions", ALT 2007; Rahimi and Recht, "Random Features for Large-Scale Kernel
Machines", NIPS 2007.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops import Implementation, jbu_apply, joint_kernel, pool_guidance
from featup_hub.ops.reference import mirror, repeat

_FINER = 2  # times the output size, to embed colours; finer is no better
# Of a source of several looks: a cell keeps part of its own features, which the other looks
# confirm. Tuned on training images; the share was lowered after results on validation images, see
# benchmarks/LOG.md.
_WIDER, _SMOOTHED = 2.0, 0.7


class JointKernels(NamedTuple):
    """Kernels of a joint bilateral stage; all except the learned ones always sum to one.

    Attributes:
        smoothing: One kernel per cell, over cells, (B, D², h, w); for a stitched source, one per
            cell of each look, (B·k², D², h/k, w/k), rounded up.
        upsampling: Per pass, one kernel per pixel, over pixels that have their cell's features,
            (B, D², H, W).
        learned: Per pass, one kernel per pixel, over pixels of the resized source, (B, D², H, W).
        looks_per_side: k, see :meth:`JointBilateralStage.kernels`.
    """

    smoothing: Tensor
    upsampling: tuple[Tensor, ...]
    learned: tuple[Tensor, ...]
    looks_per_side: int = 1


class JointBilateralStage(nn.Module):
    r"""Smooths a source, then upsamples it by up to two in each pass, next to a learned stage.

    Every colour x has an embedding :math:`\phi(x) = \sqrt{2/E} \cos(\Omega x + \beta)`, and a cell
    or pixel has the mean :math:`\mu` of its colours' embeddings. Distances of these means measure
    differences of distributions: two cells of one mean colour differ if an edge crosses one of
    them. Both filters weight by distance and likeness of colour,
    :math:`w_{pq} \propto \exp(-|p - q|^2 / 2\sigma^2 - |\mu_p - \mu_q|^2 / 2\tau^2)`, normalised
    over the neighbourhood. Smoothing compares cells with cells. Upsampling compares a pixel of a
    pass's output with its neighbours' cells, and in the second pass with the pixels of the first
    pass. Positions are in cells of the source, in every pass.

    Args:
        guidance_dim: Channels of the image.
        radius: Reach of both filters, in cells and in pixels of the output.
        embedding_dim: Length E of an embedding.
        smoothing_spatial: σ of the smoothing, its strength; 0 disables it, and stays 0 in training.
        smoothing_range: τ of the smoothing, of a cell's distribution: from 0 (alike) to √2.
        spatial: σ of the upsampling.
        range: τ of the upsampling.
        share: Share of the upsampling in the output; the rest is the learned stage's.
        bandwidth: Deviation of the Gaussian kernel of colours that the embeddings approximate, in
            units of the normalised image. Sets the initial Ω and β; they are parameters, too.

    Example:
        >>> stage, image = JointBilateralStage(), torch.randn(1, 3, 64, 96)
        >>> learned = torch.full((1, 49, 8, 12), 1 / 49)
        >>> kernels = stage.kernels(image, (4, 6), [learned])
        >>> stage(torch.randn(1, 5, 4, 6), kernels).shape
        torch.Size([1, 5, 8, 12])
    """

    def __init__(
        self,
        guidance_dim: int = 3,
        radius: int = 3,
        *,
        embedding_dim: int = 32,
        smoothing_spatial: float = 1.5,
        smoothing_range: float = 0.18,
        spatial: float = 1.25,
        range: float = 0.17,
        share: float = 0.5,
        bandwidth: float = 0.3,
    ) -> None:
        super().__init__()
        self.radius = radius
        self.smoothing_spatial = nn.Parameter(torch.tensor(smoothing_spatial))
        self.smoothing_range = nn.Parameter(torch.tensor(smoothing_range))
        self.spatial = nn.Parameter(torch.tensor(spatial))
        self.range = nn.Parameter(torch.tensor(range))
        self.share = nn.Parameter(torch.tensor(share))
        self.frequencies = nn.Parameter(torch.empty(embedding_dim, guidance_dim))
        self.phases = nn.Parameter(torch.empty(embedding_dim))
        # Drawn with a generator of its own on the CPU: the same for every stage and device.
        # Rounded, so that a stage in half precision has the same embeddings.
        generator = torch.Generator().manual_seed(0)
        cpu = torch.device("cpu")
        shape, exact = self.frequencies.shape, torch.float32
        normal = torch.randn(shape, generator=generator, device=cpu, dtype=exact)
        uniform = torch.rand(shape[:1], generator=generator, device=cpu, dtype=exact)
        with torch.no_grad():
            self.frequencies.copy_((normal / bandwidth).bfloat16())
            self.phases.copy_((uniform * 2 * torch.pi).bfloat16())

    def embed(self, image: Tensor) -> Tensor:
        """Embeds every pixel's colour, (B, G, H, W) -> (B, E, H, W)."""
        # Channel by channel: a convolution may be computed in TF32, and a product of matrices binds
        # an exported program to the strides of its example.
        angles = self.phases.to(image)[:, None, None]
        for weight, channel in zip(self.frequencies.to(image).t(), image.unbind(1), strict=True):
            angles = torch.addcmul(angles, weight[:, None, None], channel[:, None])
        return (2 / angles.shape[1]) ** 0.5 * angles.cos()

    def kernels(
        self,
        image: Tensor,
        source_size: tuple[int, int],
        learned: Sequence[Tensor],
        *,
        looks_per_side: int = 1,
        impl: Implementation = "auto",
    ) -> JointKernels:
        """Computes both filters, in the image's precision.

        Args:
            image: The image, (B, G, H, W), float32 or better.
            source_size: Height and width of the source.
            learned: Kernels of the learned stage for each pass, (B, D², H, W), first to last, at
                the size of the pass's output.
            looks_per_side: k, if the source is stitched from k² looks. Each look is smoothed
                separately, with twice the σ, and the result is 0.7 of the smoothed features and
                0.3 of the cell's own.
            impl: Implementation, see :mod:`featup_hub.ops.jbu`.

        Raises:
            ValueError: If ``learned`` is empty.
        """
        if not learned:
            raise ValueError(
                "kernels of at least one pass of the learned stage are needed; got none"
            )
        sizes = [source_size, *((x.shape[2], x.shape[3]) for x in learned)]
        height, width = sizes[-1]
        pixels = self.embed(pool_guidance(image, (_FINER * height, _FINER * width)))
        looks = [pool_guidance(pixels, size) for size in sizes]

        compare = partial(joint_kernel, radius=self.radius, impl=impl)
        own, spatial = looks[0], cast(Tensor, self.smoothing_spatial)
        if looks_per_side > 1:
            own = _split(_over_stride(own, looks_per_side), looks_per_side)
            spatial = _WIDER * spatial
        grid = (own.shape[2], own.shape[3])
        smoothing = compare(own, own, spatial, self.smoothing_range, cells=grid)
        if looks_per_side > 1:
            centre = torch.arange(smoothing.shape[1], device=smoothing.device)
            itself = (centre == smoothing.shape[1] // 2).to(smoothing)[:, None, None]
            smoothing = torch.lerp(itself, smoothing, _SMOOTHED)
        return JointKernels(
            smoothing,
            tuple(
                compare(finer, coarser, self.spatial, self.range, cells=source_size)
                for coarser, finer in pairwise(looks)
            ),
            tuple(learned),
            looks_per_side,
        )

    def levels(
        self, source: Tensor, kernels: JointKernels, *, impl: Implementation = "auto"
    ) -> list[Tensor]:
        """Applies the kernels and returns the output of every pass, first to last."""
        count = kernels.looks_per_side
        smoothed = jbu_apply(_split(source, count), kernels.smoothing, impl=impl)
        levels = [_joined(smoothed, count, (source.shape[2], source.shape[3]))]
        for upsampling, learned in zip(kernels.upsampling, kernels.learned, strict=True):
            size = (upsampling.shape[2], upsampling.shape[3])
            placed = jbu_apply(repeat(levels[-1], size), upsampling, impl=impl)
            other = jbu_apply(levels[-1], learned, impl=impl)
            levels.append(torch.lerp(other, placed, self.share.to(source)))
        return levels[1:]

    def forward(
        self, source: Tensor, kernels: JointKernels, *, impl: Implementation = "auto"
    ) -> Tensor:
        """Applies the kernels, (B, C, h, w) -> (B, C, H, W), at the size of the last pass."""
        return self.levels(source, kernels, impl=impl)[-1]


def _over_stride(cells: Tensor, count: int) -> Tensor:
    """Averages around every cell of a stitched source over one stride, ``count`` cells."""
    padded = mirror(mirror(cells, count // 2, 2), count // 2, 3)
    means = F.avg_pool2d(padded, count, 1)
    return means if count % 2 else F.avg_pool2d(means, 2, 1)


def _split(cells: Tensor, count: int) -> Tensor:
    """Splits a stitched source into its looks, (B, C, h, w) -> (B·k², C, h/k, w/k)."""
    if count == 1:
        return cells
    for axis in (2, 3):  # if a look has one cell less, its own last cell is repeated
        length = cells.shape[axis]
        place = torch.arange((length + count - 1) // count * count, device=cells.device)
        own_last = (place - count).clamp(min=0)
        cells = cells.index_select(axis, torch.where(place < length, place, own_last))
    looks = F.pixel_unshuffle(cells, count).unflatten(1, (-1, count * count))
    return looks.movedim(2, 1).flatten(0, 1)


def _joined(looks: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Joins the looks of a source; the inverse of :func:`_split`."""
    if count == 1:
        return looks
    parts = looks.unflatten(0, (-1, count * count)).movedim(1, 2).flatten(1, 2)
    return F.pixel_shuffle(parts, count)[:, :, : size[0], : size[1]]
