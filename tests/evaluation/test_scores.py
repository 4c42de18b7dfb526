"""Scores of labels and depth against torchmetrics, and worked by hand."""

from __future__ import annotations

import pytest
import torch

from featup_hub.evaluation.scores import (
    METRICS,
    boundary_band,
    confusion,
    depth_edges,
    depth_sums,
    mean_iou,
)


def halves(left, right, *, columns=20, edge=10, rows=20):
    """A map with a vertical edge."""
    values = torch.full((rows, columns), left)
    values[:, edge:] = right
    return values


def depth_scores(prediction, depth):
    sums = depth_sums(prediction, depth, depth_edges(depth))
    return {
        metric.name: float(metric.value(sums[metric.sums]))
        for metric in METRICS
        if metric.sums in sums
    }


def test_confusion_and_mean_iou_equal_torchmetrics_and_leave_void_out():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    prediction, labels = torch.randint(7, (40, 50)), torch.randint(-1, 6, (40, 50))
    counts = confusion(prediction, labels, 8)  # class 7 occurs nowhere
    assert torch.equal(
        counts, functional.multiclass_confusion_matrix(prediction, labels, 8, ignore_index=-1)
    )
    assert counts.sum() == (labels >= 0).sum()
    theirs = functional.multiclass_jaccard_index(
        prediction[None], labels[None], num_classes=8, ignore_index=-1, average="macro"
    )
    torch.testing.assert_close(mean_iou(counts), theirs)


@pytest.mark.parametrize(
    ("band", "values"), [(boundary_band, halves(0, 1)), (depth_edges, halves(2.0, 3.0))]
)
def test_a_band_reaches_four_pixels_on_either_side(band, values):
    found = band(values)
    assert found[0].nonzero().flatten().tolist() == list(range(6, 14))
    assert torch.equal(band(values.t()), found.t())


def test_a_border_with_void_is_no_boundary_and_void_is_never_in_the_band():
    labels = halves(0, -1, rows=9, columns=30, edge=15)
    assert not boundary_band(labels).any()
    labels[:, 17:] = 1  # two void columns between: the band reaches across them
    assert boundary_band(labels)[0].nonzero().flatten().tolist() == [13, 14, 17, 18]


def test_a_gentle_slope_and_a_hole_are_no_depth_edges():
    slope = torch.linspace(1, 2, 40).expand(10, 40).clone()
    slope[:, 20] = 0  # a sensor's hole
    assert not depth_edges(slope).any()


def test_depth_scores_of_three_pixels_worked_by_hand():
    depth = torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    found = depth_scores(torch.tensor([[1.2, 2.0, 2.0, 9.0]]), depth)  # the last is missing
    assert found["RMSE"] == found["edge RMSE"] == pytest.approx(((0.04 + 0 + 4) / 3) ** 0.5)
    assert found["AbsRel"] == pytest.approx((0.2 + 0 + 0.5) / 3)
    assert found["δ<1.25"] == pytest.approx(2 / 3)


def test_a_negative_depth_never_counts_as_close():
    depth = torch.full((4, 4), 2.0)
    found = depth_scores(-depth, depth)
    assert (found["δ<1.25"], found["AbsRel"]) == (0, 2)
