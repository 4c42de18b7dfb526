"""Depth scores: RMSE, δ < 1.25, absolute relative error, and RMSE along depth edges, per image.

Depth is (H, W) in metres; values of zero or less mean missing and are ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.statistics import Metric

__all__ = ["DEPTH", "depth_edges", "depth_sums"]

EDGE_JUMP = 0.1
DELTA = 1.25


def depth_edges(depth: Tensor, width: int = 4) -> Tensor:
    """Marks pixels within ``width`` pixels of a jump in depth of more than about 10 %.

    Args:
        depth: Depth in metres, (H, W), zero or less where missing.
        width: Reach in pixels on either side, diagonals counting as one.

    Returns:
        The band without missing pixels, (H, W), bool.
    """
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
    """Measures one image.

    Args:
        prediction: Predicted depth in metres, (H, W).
        depth: True depth in metres, (H, W), zero or less where missing.
        edges: From :func:`depth_edges`, (H, W).

    Returns:
        ``depth`` (4,): pixels, squared errors, relative errors, pixels with δ < 1.25; and
        ``depth_edges`` (2,): pixels and squared errors within 4 px of depth edges.
    """
    valid = depth > 0
    truth, guess = depth[valid].double(), prediction[valid].double()
    square = (guess - truth).square()
    # The ratio of a non-positive prediction counts as infinite.
    ratio = torch.where(guess > 0, torch.maximum(guess / truth, truth / guess), torch.inf)
    edge = edges[valid]
    count = torch.tensor(float(truth.numel()), dtype=torch.float64)
    return {
        "depth": torch.stack(
            [count, square.sum(), ((guess - truth).abs() / truth).sum(), (ratio < DELTA).sum()]
        ),
        "depth_edges": torch.stack([edge.sum().double(), square[edge].sum()]),
    }


def _rmse(sums: Tensor) -> Tensor:
    return (sums[..., 1] / sums[..., 0]).sqrt()


DEPTH = (
    Metric(
        name="edge RMSE", sums="depth_edges", value=_rmse, higher_is_better=False, percent=False
    ),
    Metric(name="RMSE", sums="depth", value=_rmse, higher_is_better=False, percent=False),
    Metric(
        name="AbsRel",
        sums="depth",
        value=lambda s: s[..., 2] / s[..., 0],
        higher_is_better=False,
        percent=False,
    ),
    Metric(name="δ<1.25", sums="depth", value=lambda s: s[..., 3] / s[..., 0]),
)
