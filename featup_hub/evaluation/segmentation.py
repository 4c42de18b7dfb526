"""Segmentation scores per image: confusion matrix and the band along label boundaries.

Labels are (H, W) integers; negative labels are void and are ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.statistics import Metric

__all__ = ["SEGMENTATION", "boundary_band", "confusion", "mean_iou", "segmentation_sums"]


def confusion(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts pixels by true (row) and predicted (column) class.

    Args:
        prediction: Predicted classes, any shape.
        labels: True classes of the same shape, negative for void.
        classes: Number of classes K.

    Returns:
        Counts, (K, K), integers.
    """
    valid = labels >= 0
    index = labels[valid] * classes + prediction[valid]
    return torch.bincount(index, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: Tensor) -> Tensor:
    """Averages intersection over union over the classes that occur in labels or predictions.

    Args:
        counts: Confusion matrices, (..., K, K).

    Returns:
        Scores in [0, 1], (...).
    """
    hits = counts.diagonal(dim1=-2, dim2=-1)
    union = counts.sum(-1) + counts.sum(-2) - hits
    occurs = union > 0
    return torch.where(occurs, hits / union.clamp(min=1), 0.0).sum(-1) / occurs.sum(-1)


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Divides the correct pixels by all, (..., K, K) -> (...)."""
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1))


def boundary_band(labels: Tensor, width: int = 4) -> Tensor:
    """Marks pixels with another label within ``width`` pixels, diagonals counting as one.

    A border between a label and void is not a boundary: it belongs to the annotation, not to an
    object. Two labels with void between them are compared across it.

    Args:
        labels: True classes, (H, W), negative for void.
        width: Reach in pixels on either side.

    Returns:
        The band without void pixels, (H, W), bool.

    Example:
        >>> boundary_band(torch.tensor([[0, 0, 0, 1, 1, 1]]), width=1).int()
        tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    void = labels < 0
    values = labels.float()[None, None]
    window, reach = 2 * width + 1, width
    highest = F.max_pool2d(values.masked_fill(void, -torch.inf), window, 1, reach)
    lowest = -F.max_pool2d((-values).masked_fill(void, -torch.inf), window, 1, reach)
    return (highest > lowest)[0, 0] & ~void


def segmentation_sums(
    prediction: Tensor, labels: Tensor, band: Tensor, classes: int
) -> dict[str, Tensor]:
    """Measures one image.

    Args:
        prediction: Predicted classes, (H, W).
        labels: True classes, (H, W), negative for void.
        band: From :func:`boundary_band`, (H, W).
        classes: Number of classes K.

    Returns:
        ``confusion`` (K, K), and ``band`` (2,): correct pixels and all pixels of the band.
    """
    correct = (prediction == labels)[band].sum()
    return {
        "confusion": confusion(prediction, labels, classes),
        "band": torch.stack([correct, band.sum()]),
    }


SEGMENTATION = (
    Metric(name="boundary accuracy", sums="band", value=lambda s: s[..., 0] / s[..., 1]),
    Metric(name="mIoU", sums="confusion", value=mean_iou),
    Metric(name="accuracy", sums="confusion", value=pixel_accuracy),
)
