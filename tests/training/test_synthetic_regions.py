"""Synthetic regions: their properties, and that stages learn from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.training.seeds import seeded
from featup_hub.training.synthetic_regions import random_field, random_regions, reduce_regions

pytest.importorskip("skimage", reason="scikit-image is not installed: the extra [train]")


def two_halves() -> torch.Tensor:
    rgb = torch.zeros(1, 3, 32, 48)
    rgb[..., 20:] = 0.9
    return rgb


def test_a_photograph_of_two_colours_has_two_regions_with_their_common_edge():
    regions = random_regions(two_halves(), 4, seeded(1))
    assert regions.shape == (1, 4, 32, 48)
    left, right = regions[0, :, :, :18], regions[0, :, :, 22:]
    assert (left == left[:, :1, :1]).all()
    assert (right == right[:, :1, :1]).all()
    assert not torch.equal(left[:, 0, 0], right[:, 0, 0])


def test_the_generator_decides_everything():
    rgb = torch.rand(2, 3, 24, 24, generator=seeded(2))
    once, again = (random_regions(rgb, 3, seeded(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, random_regions(rgb, 3, seeded(6)))


def test_all_three_ways_down_occur_and_keep_what_is_constant():
    regions = random_regions(two_halves(), 2, seeded(3))
    ways = {tuple(reduce_regions(regions, (4, 6), seeded(n))[0, 0, 0].tolist()) for n in range(20)}
    assert len(ways) == 3
    means = tuple(F.adaptive_avg_pool2d(regions, (4, 6))[0, 0, 0].tolist())
    assert means in ways
    constant = torch.full((1, 2, 32, 48), 0.7)
    for n in range(6):
        reduced = reduce_regions(constant, (4, 6), seeded(n))
        torch.testing.assert_close(reduced, constant[..., :4, :6])


def test_a_field_is_smooth_of_unit_variance_and_resolved_by_its_grid():
    field = random_field((12, 16), (96, 128), (2, 3), seeded(4))
    assert field.shape == (2, 3, 96, 128)
    assert field.mean().abs() < 1e-5
    assert abs(field.std() - 1) < 1e-5
    assert field.diff(dim=3).square().mean() < 0.1
    cells = F.adaptive_avg_pool2d(field, (12, 16))
    again = F.interpolate(cells, (96, 128), mode="bicubic")
    assert (again - field)[..., 8:-8, 8:-8].square().mean() < 0.15
