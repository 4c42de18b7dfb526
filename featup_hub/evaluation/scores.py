"""Scores of predicted labels and depth, as sums per image.

Labels are (H, W) integers; negative labels are void. Depth is (H, W) in metres; values of zero or
less are missing. Void and missing pixels do not count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.statistics import Metric, ratio

__all__ = [
    "DEPTH",
    "SEGMENTATION",
    "boundary_band",
    "confusion",
    "depth_edges",
    "depth_sums",
    "mean_iou",
    "segmentation_sums",
]

EDGE_JUMP = 0.1
DELTA = 1.25


def confusion(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts pixels by true (row) and predicted (column) class, (K, K)."""
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
    """Compares predicted classes with labels.

    Returns:
        ``confusion`` (K, K), and ``band`` (2,): correct pixels and all pixels of the band, which
        is that of :func:`boundary_band`.
    """
    correct = (prediction == labels)[band].sum()
    return {
        "confusion": confusion(prediction, labels, classes),
        "band": torch.stack([correct, band.sum()]),
    }


def depth_edges(depth: Tensor, width: int = 4) -> Tensor:
    """Marks pixels within ``width`` pixels of a jump in depth of more than about 10 %."""
    valid = depth > 0
    log = depth.clamp(min=1e-3).log()
    jump = torch.zeros_like(valid)
    for axis in (0, 1):
        length = depth.shape[axis] - 1
        ends = [x.narrow(axis, start, length) for start in (0, 1) for x in (log, valid)]
        step = ((ends[0] - ends[2]).abs() > EDGE_JUMP) & ends[1] & ends[3]
        for start in (0, 1):
            jump.narrow(axis, start, length).logical_or_(step)
    # A marked pixel touches the edge, so it already counts as one of the ``width`` pixels.
    band = F.max_pool2d(jump.float()[None, None], 2 * width - 1, 1, width - 1)[0, 0] > 0
    return band & valid


def depth_sums(prediction: Tensor, depth: Tensor, edges: Tensor) -> dict[str, Tensor]:
    """Compares predicted with true depth.

    Returns:
        ``depth`` (4,): pixels, squared errors, relative errors, pixels with δ < 1.25; and
        ``depth_edges`` (2,): pixels and squared errors in the band of :func:`depth_edges`.
    """
    valid = depth > 0
    truth, guess = depth[valid].double(), prediction[valid].double()
    square = (guess - truth).square()
    # The ratio of a non-positive prediction counts as infinite.
    off = torch.where(guess > 0, torch.maximum(guess / truth, truth / guess), torch.inf)
    edge = edges[valid]
    count = torch.tensor(float(truth.numel()), dtype=torch.float64)
    return {
        "depth": torch.stack(
            [count, square.sum(), ((guess - truth).abs() / truth).sum(), (off < DELTA).sum()]
        ),
        "depth_edges": torch.stack([edge.sum().double(), square[edge].sum()]),
    }


def _rmse(name: str, sums: str) -> Metric:
    def value(s: Tensor) -> Tensor:
        return (s[..., 1] / s[..., 0]).sqrt()

    return Metric(name=name, sums=sums, value=value, higher_is_better=False, percent=False)


SEGMENTATION = (
    ratio("boundary accuracy", "band", 0, 1),
    Metric(name="mIoU", sums="confusion", value=mean_iou),
    Metric(name="accuracy", sums="confusion", value=pixel_accuracy),
)
DEPTH = (
    _rmse("edge RMSE", "depth_edges"),
    _rmse("RMSE", "depth"),
    ratio("AbsRel", "depth", 2, 0, higher_is_better=False, percent=False),
    ratio("δ<1.25", "depth", 3, 0),
)
