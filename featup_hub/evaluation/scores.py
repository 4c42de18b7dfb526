"""All scores; those of predicted labels and depth, as sums per image.

Labels are (H, W) integers; negative labels are void. Depth is (H, W) in metres; values of zero or
less are missing. Void and missing pixels do not count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.statistics import Metric

EDGE_JUMP = 0.1
DELTA = 1.25


def confusion(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts pixels by true (row) and predicted (column) class, (K, K)."""
    valid = labels >= 0
    index = labels[valid] * classes + prediction[valid]
    return torch.bincount(index, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: Tensor, *, first: int = 0) -> Tensor:
    """Averages intersection over union over the classes that occur in labels or predictions.

    Takes confusion matrices, (..., K, K), and returns scores in [0, 1], (...). ``first`` is the
    first class that counts.
    """
    hits = counts.diagonal(dim1=-2, dim2=-1)[..., first:]
    union = (counts.sum(-1) + counts.sum(-2))[..., first:] - hits
    occurs = union > 0
    return torch.where(occurs, hits / union.clamp(min=1), 0.0).sum(-1) / occurs.sum(-1)


def boundary_band(labels: Tensor, width: int = 4) -> Tensor:
    """Marks pixels with another label within ``width`` pixels, diagonals counting as one.

    A border between a label and void is not a boundary: it belongs to the annotation, not to an
    object. Two labels with void between them are compared across it.
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

    ``band`` (2,) counts correct pixels and all pixels of the band of :func:`boundary_band`.
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
        both = valid.narrow(axis, 0, length) & valid.narrow(axis, 1, length)
        step = (log.diff(dim=axis).abs() > EDGE_JUMP) & both
        for start in (0, 1):
            jump.narrow(axis, start, length).logical_or_(step)
    # A marked pixel touches the edge, so it already counts as one of the ``width`` pixels.
    band = F.max_pool2d(jump.float()[None, None], 2 * width - 1, 1, width - 1)[0, 0] > 0
    return band & valid


def depth_sums(prediction: Tensor, depth: Tensor, edges: Tensor) -> dict[str, Tensor]:
    """Compares predicted with true depth.

    ``depth`` (4,) is: pixels, squared errors, relative errors, pixels with δ < 1.25;
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


def _ratio(top: int, bottom: int) -> Callable[[Tensor], Tensor]:
    """Divides one of the sums by another."""
    return lambda sums: sums[..., top] / sums[..., bottom]


def _rmse(sums: Tensor) -> Tensor:
    return (sums[..., 1] / sums[..., 0]).sqrt()


METRICS = (
    Metric("J", "jaccard", _ratio(0, 1)),
    Metric("boundary accuracy", "band", _ratio(0, 1)),
    Metric("mIoU", "confusion", mean_iou),
    Metric("accuracy", "confusion", lambda k: k.diagonal(0, -2, -1).sum(-1) / k.sum((-2, -1))),
    Metric("edge RMSE", "depth_edges", _rmse, higher_is_better=False, percent=False),
    Metric("RMSE", "depth", _rmse, higher_is_better=False, percent=False),
    Metric("AbsRel", "depth", _ratio(2, 0), higher_is_better=False, percent=False),
    Metric("δ<1.25", "depth", _ratio(3, 0)),
    Metric("Average Drop", "cam", _ratio(1, 0), higher_is_better=False),
    Metric("Average Increase", "cam", _ratio(2, 0)),
    Metric("Coherency", "cam", _ratio(3, 0)),
    Metric("Complexity", "cam", _ratio(4, 0), higher_is_better=False),
    Metric("ADCC", "cam", _ratio(5, 0)),
    Metric("view error", "consistency", _ratio(0, 1), higher_is_better=False),
    *(
        Metric(name, "cost", _ratio(place, 0), higher_is_better=False, percent=False)
        for place, name in enumerate(
            ("seconds", "CPU seconds", "peak MiB", "CPU seconds with backbone"), start=1
        )
    ),
)
"""All scores, in the order of tables. The protocols say what their sums are."""
