"""The bootstrap: coverage, paired resampling, and no change of the global generator."""

from __future__ import annotations

import math

import pytest
import torch

from featup_hub.evaluation.statistics import Metric, estimate

MEAN = Metric("mean", "x", lambda s: s[..., 0] / s[..., 1])


def sums(values):
    return torch.stack([values, torch.ones_like(values)], dim=1)


def normal(count):
    return torch.randn(count, generator=torch.Generator().manual_seed(1)).double()


def test_the_interval_is_that_of_the_mean_of_all_images_together():
    assert estimate(MEAN, torch.tensor([[1.0, 2.0], [3.0, 10.0]])).value == pytest.approx(4 / 12)
    found = estimate(MEAN, sums(normal(400)), resamples=4000)
    half = 1.96 * float(normal(400).std()) / 400**0.5
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_blocks_of_frames_that_are_alike_count_once():
    frames = sums(normal(40).repeat_interleave(10))
    half = 1.96 * float(normal(40).std()) / 40**0.5
    found = estimate(MEAN, frames, resamples=4000, block=10)
    # A triangle of weights in place of the clips' own borders makes blocks see two thirds of it.
    assert (found.high - found.low) / 2 == pytest.approx(half * (2 / 3) ** 0.5, rel=0.1)
    blind = estimate(MEAN, frames, resamples=4000)
    assert (blind.high - blind.low) / 2 == pytest.approx(half / 10**0.5, rel=0.1)


def test_blocks_that_do_not_divide_the_images_still_draw_as_many():
    ones = sums(torch.ones(7))
    assert estimate(Metric("n", "x", lambda s: s[..., 1]), ones, block=3).low == 7


@pytest.mark.parametrize(("count", "block"), [(1, 1), (5, 6), (6, 6)])
def test_images_of_one_block_give_no_interval(count, block):
    found = estimate(MEAN, sums(torch.ones(count)), sums(torch.zeros(count)), block=block)
    assert (found.value, found.significant) == (1, False)
    assert [found.low, found.high] == [pytest.approx(math.nan, nan_ok=True)] * 2


def test_a_small_difference_is_significant_because_images_are_paired():
    values = 10 * torch.randn(60)
    better = values + 0.1 + 0.02 * torch.randn(60)
    difference = estimate(MEAN, sums(better), sums(values))
    assert difference.value == pytest.approx(0.1, abs=0.02)
    assert difference.significant
    assert difference.high - difference.low < 0.02
    none = estimate(MEAN, sums(values), sums(values))
    assert (none.value, none.low, none.high, none.significant) == (0, 0, 0, False)
    with pytest.raises(ValueError, match="same images on both sides"):
        estimate(MEAN, sums(torch.randn(3)), sums(torch.randn(4)))


def test_the_same_seed_gives_the_same_interval_and_the_global_generator_is_untouched():
    stacked, state = sums(torch.randn(30)), torch.get_rng_state()
    assert estimate(MEAN, stacked, seed=3) == estimate(MEAN, stacked, seed=3)
    assert estimate(MEAN, stacked, seed=3) != estimate(MEAN, stacked, seed=4)
    assert torch.equal(state, torch.get_rng_state())
