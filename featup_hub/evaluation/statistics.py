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
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "Metric", "estimate"]


class Metric(NamedTuple):
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
    """A score of all images together, or a difference of two, and its 95 % interval.

    The ends of an unknown interval are NaN.
    """

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval of a difference excludes zero."""
        return self.low > 0 or self.high < 0


def estimate(
    metric: Metric,
    sums: Tensor,
    baseline: Tensor | None = None,
    *,
    resamples: int = 1000,
    block: int = 1,
    seed: int = 0,
) -> Estimate:
    """Scores all images together, or the difference from a reference upsampler.

    ``sums`` are those of every image, (N, *S), in order of neighbours; ``baseline`` has the
    reference's of the same images, resampled together with them. ``resamples`` counts bootstrap
    replicates; ``block`` neighbouring images are drawn together, 1 if images are independent. The
    interval is unknown if all images are one block: every replicate would then be the same.
    """
    if baseline is not None and sums.shape != baseline.shape:
        raise ValueError(
            "a paired difference needs the same images on both sides, sums of equal shape; "
            f"got {tuple(sums.shape)} and {tuple(baseline.shape)}; measure both in one run"
        )

    def scores(sums: Tensor) -> Tensor:
        """Returns the score of all images, then that of every replicate."""
        total = sums.double().sum(0, keepdim=True)
        return metric.value(torch.cat([total, _resample(sums, resamples, block, seed)]))

    found = scores(sums) if baseline is None else scores(sums) - scores(baseline)
    replicates = found[1:][found[1:].isfinite()]
    low = high = float("nan")
    if len(replicates) and len(sums) > block:
        low, high = replicates.quantile(replicates.new_tensor([0.025, 0.975])).tolist()
    return Estimate(value=float(found[0]), low=low, high=high)


def _resample(sums: Tensor, resamples: int, block: int, seed: int) -> Tensor:
    """Adds up N images drawn with replacement, block by block, (N, *S) -> (resamples, *S)."""
    count = sums.shape[0]
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(count, (resamples, -(-count // block), 1), generator=generator)
    drawn = (first + torch.arange(block)).flatten(1)[:, :count] % count
    times = torch.zeros(resamples, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    return (times @ sums.double().flatten(1)).reshape(resamples, *sums.shape[1:])
