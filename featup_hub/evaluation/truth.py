"""One image's predictions against everything known of it."""

from __future__ import annotations

from torch import Tensor

from featup_hub.evaluation.depth import depth_sums
from featup_hub.evaluation.folders import Sample
from featup_hub.evaluation.segmentation import segmentation_sums

__all__ = ["sums_against"]


def sums_against(
    sample: Sample, labels: Tensor | None, depth: Tensor | None, classes: int
) -> dict[str, Tensor]:
    """Measures predictions where there is something to compare them with.

    Args:
        sample: The truth.
        labels: Predicted classes, (H, W).
        depth: Predicted depth in metres, (H, W).
        classes: Number of classes.

    Returns:
        Sums of segmentation, of depth, or of both.
    """
    sums: dict[str, Tensor] = {}
    if labels is not None and sample.labels is not None and sample.strip is not None:
        sums |= segmentation_sums(labels, sample.labels, sample.strip, classes)
    if depth is not None and sample.depth is not None and sample.edges is not None:
        sums |= depth_sums(depth, sample.depth, sample.edges)
    return sums
