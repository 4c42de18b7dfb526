"""Scores with 95 % intervals, and paired differences, by resampling images.

Every measurement gives one small tensor of sums per image (a confusion matrix, squared errors and
their count, ...). A score is a function of these sums added over images, so a bootstrap replicate
is one weighted sum. Frames of a clip are not independent: blocks of neighbours are drawn from them,
on a circle, so that intervals are not too narrow.

Sources: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, percentile intervals; Politis
& Romano, "A Circular Block-Resampling Procedure for Stationary Data", 1992.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "Metric", "compare", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score as a function of per-image sums.

    Attributes:
        name: Name in tables.
        sums: Name of the tensor of sums.
        value: Sums over images (..., *S) -> scores (...).
        higher_is_better: Direction of improvement.
        percent: Whether it is a share, to be shown in percent.
    """

    name: str
    sums: str
    value: Callable[[Tensor], Tensor]
    higher_is_better: bool = True
    percent: bool = True


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval over images.

    Attributes:
        value: The score of all images together, or a difference of two.
        low: 2.5th percentile over resamples.
        high: 97.5th percentile over resamples.
    """

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval of a difference excludes zero."""
        return self.low > 0 or self.high < 0


def estimate(
    metric: Metric, sums: Tensor, *, resamples: int = 1000, block: int = 1, seed: int = 0
) -> Estimate:
    """Scores all images together, with an interval.

    Args:
        metric: The score.
        sums: Sums of every image, (N, *S), in order of neighbours.
        resamples: Bootstrap replicates.
        block: Neighbouring images that are drawn together; 1 if images are independent.
        seed: Seed of the resampling.

    Returns:
        The score and its interval.
    """
    replicates = metric.value(_resample(sums, resamples, block, seed))
    return _interval(metric.value(sums.double().sum(0)), replicates)


def compare(
    metric: Metric,
    sums: Tensor,
    baseline: Tensor,
    *,
    resamples: int = 1000,
    block: int = 1,
    seed: int = 0,
) -> Estimate:
    """Scores the difference of two upsamplers on the same images, resampled together.

    Args:
        metric: The score.
        sums: Sums of every image, (N, *S), in order of neighbours.
        baseline: Sums of the reference upsampler, (N, *S).
        resamples: Bootstrap replicates.
        block: Neighbouring images that are drawn together; 1 if images are independent.
        seed: Seed of the resampling.

    Returns:
        The score minus the baseline's, with the interval of the difference.

    Raises:
        ValueError: If the two were not measured on the same number of images.
    """
    if sums.shape != baseline.shape:
        raise ValueError(
            "a paired difference needs the same images on both sides, sums of equal shape; "
            f"got {tuple(sums.shape)} and {tuple(baseline.shape)}; measure both in one run"
        )
    value = metric.value(sums.double().sum(0)) - metric.value(baseline.double().sum(0))
    replicates = metric.value(_resample(sums, resamples, block, seed)) - metric.value(
        _resample(baseline, resamples, block, seed)
    )
    return _interval(value, replicates)


def _resample(sums: Tensor, resamples: int, block: int, seed: int) -> Tensor:
    """Adds up N images drawn with replacement, block by block, (N, *S) -> (resamples, *S)."""
    count = sums.shape[0]
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(count, (resamples, -(-count // block), 1), generator=generator)
    drawn = (first + torch.arange(block)).flatten(1)[:, :count] % count
    times = torch.zeros(resamples, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    return (times @ sums.double().flatten(1)).reshape(resamples, *sums.shape[1:])


def _interval(value: Tensor, replicates: Tensor) -> Estimate:
    finite = replicates[replicates.isfinite()]
    low, high = (
        torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
        if finite.numel()
        else (float("nan"), float("nan"))
    )
    return Estimate(value=float(value), low=low, high=high)
