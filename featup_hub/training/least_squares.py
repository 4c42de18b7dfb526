r"""Multi-view consistency of one image as a linear least-squares problem, solved exactly.

With a uniform downsampler FeatUp's objective is linear in the high-resolution features F. Write
F = U z: z is a source of two to four times the backbone's resolution. U is the JBU upsampler of
this image; it is linear in its source. Then every channel is a ridge regression with the same
matrix:

.. math:: \min_z \sum_v \|D_v U z - f_v\|^2 + \lambda \|z - z_0\|^2

f_v are the backbone's features of view v. D_v averages over the middle of every cell of that view.
z_0 is the backbone's features of the image, interpolated bilinearly.

:class:`NormalEquations` adds up AᵀA and Aᵀf with A = D_v U, a few views at a time. A cell of z
affects only a small part of F. Distant cells therefore share a channel when the columns of U are
computed, and the number of channels does not grow with the image (column grouping: Curtis, Powell,
Reid, "On the Estimation of Sparse Jacobian Matrices", IMA J. Appl. Math. 13, 1974). For the same
reason AᵀA is a band: a block of rows of cells touches only the block above and the block below, and
the Cholesky factorisation keeps that form.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), eq. 1 without the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.training.views import Jitter, centres, positions, sample_map
from featup_hub.upsamplers import JBUStack

Views = Iterable[tuple[Sequence[Jitter], Tensor]]

CELLS = 64 * 64  # approximate cells of z; more if twice the backbone's resolution needs more
RATIOS = (2, 4)  # least and most cells of z per backbone cell, along each side
RIDGES = (0.03, 0.3, 1.0)  # λ to choose from, in units of the matrix' mean diagonal
TAPS, FOOTPRINT = 3, 0.7  # points along each side of a cell, and the share of the side they cover


def fit_source(
    image: Tensor, upsampler: JBUStack, fitted: Views, held_out: Views
) -> tuple[Tensor, float]:
    """Finds the source z whose upsampled features explain views of an image, (1, 3, H, W).

    ``fitted`` yields views and their features, (V, C, h, w), a few at a time; the very first view
    is the image itself. ``held_out`` yields further views, to choose the ridge.

    Returns z, (1, C, H', W'), at two to four times the backbone's resolution, and the unexplained
    share of the held-out views' variation.
    """
    equations: NormalEquations | None = None
    for jitters, features in fitted:
        if equations is None:
            grid = (features.shape[-2], features.shape[-1])
            ratio = min(max(math.isqrt(CELLS // math.prod(grid)), RATIOS[0]), RATIOS[1])
            size = tuple(min(ratio * n, m) for n, m in zip(grid, image.shape[-2:], strict=True))
            prior = F.interpolate(features[:1], size, mode="bilinear")
            equations = NormalEquations(Basis(image, upsampler, grid, (size[0], size[1])))
        equations.add(jitters, features)
    assert equations is not None
    unseen = NormalEquations(equations.basis)
    for jitters, features in held_out:
        unseen.add(jitters, features)
    found = [equations.solve(ridge, prior) for ridge in RIDGES]
    errors = [unseen.error(source) for source in found]
    best = min(range(len(found)), key=errors.__getitem__)
    return found[best], errors[best] / unseen.variation


class Basis:
    """The columns of U: ``grid`` is the size of the backbone's features, ``source_size`` of z."""

    def __init__(
        self,
        image: Tensor,
        upsampler: JBUStack,
        grid: tuple[int, int],
        source_size: tuple[int, int],
    ) -> None:
        self.source_size = source_size
        reach = _reach(upsampler, image, source_size)
        # The window of cells that one cell of a view depends on. It never has two cells of one
        # group.
        high, wide = (
            min(2 * math.ceil(r + n / cells / 2 + 1.5) + 1, n)
            for r, n, cells in zip(reach, source_size, grid, strict=True)
        )
        self.window = (high, wide)
        rows, columns = (torch.arange(n, device=image.device) for n in source_size)
        group = (rows % high)[:, None] * wide + columns % wide
        kernels = upsampler.kernels(image, source_size)
        self.maps = image.new_empty(1, high * wide, *image.shape[-2:])  # columns by group
        for groups in torch.arange(high * wide, device=image.device).split(32):
            impulses = (group == groups[:, None, None]).to(image)[None]
            self.maps[:, groups] = upsampler.upsample(impulses, kernels)


class NormalEquations:
    """The sums AᵀA, Aᵀf and fᵀf over views.

    AᵀA is block tridiagonal. A block has as many rows of cells as a window. The last one is padded
    with cells that no view sees.

    Attributes:
        diagonal: Its diagonal blocks, (K, S, S) for S cells in a block.
        below: The blocks below the diagonal, (K - 1, S, S).
        moment: Aᵀf, (K·S, C).
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        rows, width = basis.source_size
        side = basis.window[0] * width
        blocks = -(-rows // basis.window[0])
        self.diagonal = basis.maps.new_zeros(blocks, side, side)
        self.below = basis.maps.new_zeros(blocks - 1, side, side)
        self.moment = basis.maps.new_zeros(blocks * side, 0)
        self.power = basis.maps.new_zeros(())
        self.total: Tensor | float = 0.0
        self.count = 0

    @property
    def variation(self) -> float:
        """The sum of squared deviations of the views' features from their mean."""
        mean = self.total / max(self.count, 1)
        return float(self.power - self.count * torch.as_tensor(mean).square().sum())

    def add(self, jitters: Sequence[Jitter], observed: Tensor) -> None:
        """Adds views and the backbone's features of them, (V, C, h, w)."""
        (high, wide), (_, width) = self.basis.window, self.basis.source_size
        weights, rows, columns = self._rows(jitters, (observed.shape[-2], observed.shape[-1]))
        values = observed.permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
        if not self.moment.shape[1]:
            self.moment = self.moment.new_zeros(len(self.moment), values.shape[1])
        self.power = self.power + values.square().sum()
        self.total, self.count = self.total + values.sum(0), self.count + len(values)
        # All windows with the same top row are one dense block of A.
        for top in rows.unique().tolist():
            chosen = (rows == top).nonzero()[:, 0]
            left = columns[chosen][:, None] + torch.arange(wide, device=chosen.device)
            order = (top + torch.arange(high, device=chosen.device)) % high
            part = weights[chosen][:, order]
            part = part.gather(2, (left % wide)[:, None].expand_as(part))
            block = part.new_zeros(len(chosen), high, width)
            block = block.scatter(2, left[:, None].expand_as(part), part).flatten(1)
            self.moment[top * width : (top + high) * width] += block.t() @ values[chosen]
            square = block.t() @ block
            number, start = top // high, top % high * width
            split = len(square) - start  # cells of the window in the first of its two blocks
            self.diagonal[number, start:, start:] += square[:split, :split]
            if start:
                self.below[number, :start, start:] += square[split:, :split]
                self.diagonal[number + 1, :start, :start] += square[split:, split:]

    def _rows(
        self, jitters: Sequence[Jitter], grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rows of A: weights by group, and the first row and column of the window."""
        maps, (high, wide) = self.basis.maps, self.basis.window
        weights, tops, lefts = [], [], []
        for jitter in jitters:
            y, x = positions(jitter, _taps(grid[0]), _taps(grid[1]))
            points = F.avg_pool2d(sample_map(maps, y, x), TAPS)[0]  # (groups, h, w)
            weights.append(points.flatten(1).t().unflatten(1, (high, wide)))
            first = [
                (axis.unflatten(0, (-1, TAPS)).mean(1) * n).long().sub(side // 2).clamp(0, n - side)
                for axis, n, side in zip(
                    (y, x), self.basis.source_size, self.basis.window, strict=True
                )
            ]
            top, left = torch.meshgrid(*first, indexing="ij")
            tops.append(top.flatten())
            lefts.append(left.flatten())
        return torch.cat(weights), torch.cat(tops).to(maps.device), torch.cat(lefts).to(maps.device)

    def solve(self, ridge: float, prior: Tensor) -> Tensor:
        """Returns the z that minimises the ridge regression, (1, C, *source_size).

        It is differentiable in the features and in ``prior``, which is z_0. ``ridge`` is λ in units
        of the matrix' mean diagonal.
        """
        start = self._cells(prior)
        shift = ridge * float(self.diagonal.diagonal(dim1=1, dim2=2).sum())
        shift /= math.prod(self.basis.source_size)
        right = (self.moment - self._times(start)).unflatten(0, self.diagonal.shape[:2])
        # L is block bidiagonal: lower[k] on the diagonal, and left[k] in front of lower[k + 1].
        lower: list[Tensor] = []
        left: list[Tensor] = []
        found: list[Tensor] = []
        for number, block in enumerate(self.diagonal):
            block = block.clone()
            block.diagonal().add_(shift)
            known = right[number]
            if number:
                beside = torch.linalg.solve_triangular(
                    lower[-1], self.below[number - 1].t(), upper=False
                ).t()
                block -= beside @ beside.t()
                known = known - beside @ found[-1]
                left.append(beside)
            lower.append(torch.linalg.cholesky(block))
            found.append(torch.linalg.solve_triangular(lower[-1], known, upper=False))
        for number in reversed(range(len(found))):
            if number + 1 < len(found):
                found[number] = found[number] - left[number].t() @ found[number + 1]
            found[number] = torch.linalg.solve_triangular(
                lower[number].t(), found[number], upper=True
            )
        cells = (start + torch.cat(found))[: math.prod(self.basis.source_size)]
        return cells.t().unflatten(1, self.basis.source_size)[None]

    def error(self, source: Tensor) -> float:
        """Returns the sum of squared errors of the views for a source z."""
        z = self._cells(source)
        return float(self.power + (z * (self._times(z) - 2 * self.moment)).sum())

    def _cells(self, source: Tensor) -> Tensor:
        """Lays a source out as the unknowns, (K·S, C); cells of the padding are zero."""
        cells = source[0].flatten(1).t()
        return F.pad(cells, (0, 0, 0, len(self.moment) - len(cells)))

    def _times(self, cells: Tensor) -> Tensor:
        """Multiplies AᵀA with unknowns, (K·S, C)."""
        z = cells.unflatten(0, self.diagonal.shape[:2])
        product = self.diagonal @ z
        product[1:] += self.below @ z[:-1]
        product[:-1] += self.below.transpose(1, 2) @ z[1:]
        return product.flatten(0, 1)


def _taps(cells: int) -> Tensor:
    """Returns the points that represent the cells along an axis, in fractions of the axis."""
    return (centres(cells)[:, None] + FOOTPRINT * (centres(TAPS) - 0.5) / cells).flatten()


def _reach(upsampler: JBUStack, image: Tensor, source_size: tuple[int, int]) -> tuple[float, float]:
    """Returns the reach of a cell of z in F, vertically and horizontally, in cells of z.

    Measured on a grey image: no colour difference makes a weight vanish there.
    """
    middle = [n // 2 for n in source_size]
    impulse = image.new_zeros(1, 1, *source_size)
    impulse[0, 0, middle[0], middle[1]] = 1
    hit = upsampler(impulse, torch.zeros_like(image))[0, 0] != 0
    found = []
    for axis, (n, cell) in enumerate(zip(source_size, middle, strict=True)):
        places = (hit.any(1 - axis).nonzero().flatten() + 0.5) / hit.shape[axis] * n
        found.append(float((places - cell - 0.5).abs().max()))
    return found[0], found[1]
