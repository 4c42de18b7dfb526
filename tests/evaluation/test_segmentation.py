"""Segmentation scores against torchmetrics and against bands drawn by hand."""

from __future__ import annotations

import pytest
import torch

from featup_hub.evaluation.segmentation import (
    boundary_band,
    confusion,
    mean_iou,
    pixel_accuracy,
    segmentation_sums,
)


def test_mean_iou_equals_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    prediction, labels = torch.randint(7, (40, 50)), torch.randint(-1, 6, (40, 50))
    ours = mean_iou(confusion(prediction, labels, 8))  # class 7 occurs nowhere
    theirs = functional.multiclass_jaccard_index(
        prediction[None], labels[None], num_classes=8, ignore_index=-1, average="macro"
    )
    torch.testing.assert_close(ours, theirs)


def test_confusion_equals_torchmetrics_and_leaves_void_out():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    prediction, labels = torch.randint(5, (30, 20)), torch.randint(-1, 5, (30, 20))
    counts = confusion(prediction, labels, 5)
    theirs = functional.multiclass_confusion_matrix(prediction, labels, 5, ignore_index=-1)
    assert torch.equal(counts, theirs)
    assert counts.sum() == (labels >= 0).sum()


def test_scores_of_a_confusion_matrix_worked_by_hand():
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert pixel_accuracy(counts) == pytest.approx(9 / 12)
    assert mean_iou(counts) == pytest.approx((6 / 9 + 3 / 6) / 2)


def test_the_band_reaches_four_pixels_on_either_side():
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[:, 10:] = 1
    band = boundary_band(labels)
    assert band[:, 6:14].all()
    assert not band[:, :6].any()
    assert not band[:, 14:].any()


def test_a_border_with_void_is_no_boundary_and_void_is_never_in_the_band():
    labels = torch.zeros(9, 30, dtype=torch.long)
    labels[:, 15:] = -1
    assert not boundary_band(labels).any()
    labels[:, 17:] = 1  # two void columns between: the band reaches across them
    band = boundary_band(labels)
    assert band[0].nonzero().flatten().tolist() == [13, 14, 17, 18]


def test_band_counts_only_the_band():
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[:, 10:] = 1
    prediction = labels.clone()
    prediction[:, 0] = 1  # wrong, but far from the boundary
    prediction[:, 10] = 0
    sums = segmentation_sums(prediction, labels, boundary_band(labels), 2)
    assert sums["band"].tolist() == [20 * 7, 20 * 8]
    assert sums["confusion"].tolist() == [[180, 20], [20, 180]]
