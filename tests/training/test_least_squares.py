"""The least-squares fit against dense matrices, and its laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub import load_upsampler
from featup_hub.training.least_squares import FOOTPRINT, TAPS, Basis, NormalEquations, fit_source
from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, positions, sample_jitter, sample_map
from featup_hub.upsamplers import JBUStack

SIZE, GRID, SOURCE = (96, 128), (6, 8), (12, 16)


def jitters(count: int, seed: int = 1) -> list[Jitter]:
    generator = seeded(seed)
    drawn = [sample_jitter(SIZE, max_pad=16, generator=generator) for _ in range(count - 1)]
    return [Jitter(), *drawn]


def views_of(features: Tensor, views: list[Jitter], grid: tuple[int, int] = GRID) -> Tensor:
    """The mean over the middle of every cell of every view, by sampling the map."""
    found = []
    for view in views:
        places = []
        for cells in grid:
            offset = ((torch.arange(TAPS).double() + 0.5) / TAPS - 0.5) * FOOTPRINT
            places.append(((torch.arange(cells)[:, None] + 0.5 + offset) / cells).flatten())
        found.append(F.avg_pool2d(sample_map(features, *positions(view, *places)), TAPS))
    return torch.cat(found)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    coarse = torch.randn(1, 3, 9, 12, generator=seeded(2))
    return F.interpolate(coarse, SIZE, mode="bicubic").to(dtype)


def equations(stack: JBUStack, dtype: torch.dtype = torch.float32) -> NormalEquations:
    with torch.no_grad():
        return NormalEquations(Basis(image(dtype), stack, GRID, SOURCE))


@pytest.mark.parametrize("name", ["jbu_denoise", "jbu_faithful"])
def test_the_fit_of_views_of_a_known_map_returns_that_map(name):
    stack, views = load_upsampler(name), jitters(60)
    source = torch.randn(1, 5, *SOURCE, generator=seeded(3))
    with torch.no_grad():
        truth = stack(source, image())
        found = equations(stack)
        found.add(views, views_of(truth, views))
        fitted = stack(found.solve(1e-6, torch.zeros_like(source)), image())
    torch.testing.assert_close(fitted, truth, atol=1e-2, rtol=0)
    assert (fitted - truth).square().mean() < 1e-6 * truth.square().mean()


@pytest.mark.parametrize(("grid", "blocks"), [((6, 8), 1), ((3, 4), 1), ((23, 3), 4)])
def test_sums_and_solution_are_those_of_dense_matrices(grid, blocks):
    """Small grids, where one window holds the whole source, and grids of several blocks."""
    stack = JBUStack(num_stages=2).eval().double()
    size, source = (grid[0] * 4, grid[1] * 4), (grid[0] * 2, grid[1] * 2)
    guide = torch.randn(1, 3, *size, dtype=torch.float64, generator=seeded(4))
    generator = seeded(5)
    views = [sample_jitter(size, max_pad=3, generator=generator) for _ in range(7)]
    count = source[0] * source[1]
    observed = torch.randn(7, 2, *grid, dtype=torch.float64, generator=seeded(6))
    with torch.no_grad():
        columns = stack(torch.eye(count).double().view(1, count, *source), guide)
        matrix = views_of(columns, views, grid).movedim(1, -1).flatten(0, 2)
        found = NormalEquations(Basis(guide, stack, grid, source))
        for part in (slice(0, 4), slice(4, 7)):
            found.add(views[part], observed[part])
    values = observed.movedim(1, -1).flatten(0, 2)
    assert len(found.diagonal) == blocks
    dense, moment = matrix.t() @ matrix, matrix.t() @ values
    torch.testing.assert_close(found.moment[:count], moment, atol=1e-6, rtol=1e-6)
    assert found.variation == pytest.approx(float((values - values.mean(0)).square().sum()))
    z = torch.randn(1, 2, *source, dtype=torch.float64, generator=seeded(7))
    cells = z[0].flatten(1).t()
    ridge = 0.1 * dense.diagonal().mean()
    expected = torch.linalg.solve(dense + ridge * torch.eye(count), moment + ridge * cells)
    solution = found.solve(0.1, z)[0].flatten(1).t()
    torch.testing.assert_close(solution, expected, atol=1e-5, rtol=1e-5)
    residual = matrix @ cells - values
    assert found.error(z) == pytest.approx(float(residual.square().sum()), rel=1e-5)


def test_gradients_reach_the_features_and_the_prior():
    stack, views = JBUStack(num_stages=2).eval().double(), jitters(4)
    basis = equations(stack, torch.float64).basis

    def solve(observed, prior):
        found = NormalEquations(basis)
        found.add(views, observed)
        return found.solve(0.1, prior)

    observed = torch.randn(4, 1, *GRID, dtype=torch.float64, generator=seeded(1))
    prior = torch.randn(1, 1, *SOURCE, dtype=torch.float64, generator=seeded(2))
    inputs = (observed.requires_grad_(), prior.requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)


def test_the_held_out_views_choose_the_ridge():
    """Noisy views want a strong ridge; the error is that of the views, measured directly."""
    stack, views, unseen = load_upsampler("jbu_faithful"), jitters(12), jitters(9, 7)[1:]
    noise = torch.randn(20, 3, *GRID, generator=seeded(8))
    with torch.no_grad():
        clean = stack(torch.randn(1, 3, *SOURCE, generator=seeded(3)), image())
        seen = views_of(clean, [*views, *unseen]) + noise
        source, error = fit_source(image(), stack, [(views, seen[:12])], [(unseen, seen[12:])])
        left = views_of(stack(source, image()), unseen) - seen[12:]
        mean = seen[12:].mean((0, 2, 3), keepdim=True)
        expected = left.square().sum() / (seen[12:] - mean).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)
        weak = equations(stack)
        weak.add(views, seen[:12])
        prior = F.interpolate(seen[:1], SOURCE, mode="bilinear")
        loose = views_of(stack(weak.solve(0.03, prior), image()), unseen) - seen[12:]
    assert left.square().sum() < loose.square().sum()
