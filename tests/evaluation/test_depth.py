"""Depth scores worked by hand."""

from __future__ import annotations

import pytest
import torch

from featup_hub.evaluation.depth import DEPTH, depth_edges, depth_sums


def score(name, sums):
    metric = next(metric for metric in DEPTH if metric.name == name)
    return float(metric.value(sums[metric.sums]))


def test_depth_edges_reach_four_pixels_on_either_side_of_a_jump():
    depth = torch.full((20, 20), 2.0)
    depth[:, 10:] = 3.0
    band = depth_edges(depth)
    assert band[0].nonzero().flatten().tolist() == list(range(6, 14))
    assert torch.equal(depth_edges(depth.t()), band.t())


def test_a_gentle_slope_and_a_hole_are_no_depth_edges():
    slope = torch.linspace(1, 2, 40).expand(10, 40).clone()
    assert not depth_edges(slope).any()
    slope[:, 20] = 0  # a sensor's hole
    assert not depth_edges(slope).any()


def test_scores_of_three_pixels_worked_by_hand():
    depth = torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    prediction = torch.tensor([[1.2, 2.0, 2.0, 9.0]])  # the last pixel is missing
    sums = depth_sums(prediction, depth, depth_edges(depth))
    assert score("RMSE", sums) == pytest.approx(((0.04 + 0 + 4) / 3) ** 0.5, rel=1e-6)
    assert score("AbsRel", sums) == pytest.approx((0.2 + 0 + 0.5) / 3, rel=1e-6)
    assert score("δ<1.25", sums) == pytest.approx(2 / 3)
    assert score("edge RMSE", sums) == score("RMSE", sums)


def test_a_negative_prediction_never_counts_as_close():
    depth = torch.full((4, 4), 2.0)
    sums = depth_sums(-depth, depth, depth_edges(depth))
    assert score("δ<1.25", sums) == 0
    assert score("AbsRel", sums) == 2
