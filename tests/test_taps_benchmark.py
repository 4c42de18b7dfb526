"""The ablation's arithmetic over seeds, on scores with a known answer."""

from __future__ import annotations

import pytest

from benchmarks.taps import summary
from featup_hub.evaluation.report import Row
from featup_hub.evaluation.statistics import Estimate

SCORES = {"bilinear": 0.5, "all_0": 0.62, "all_1": 0.64, "seven_0": 0.60, "seven_1": 0.60}


def row(upsampler: str, score: float) -> Row:
    return Row(
        protocol="point oracle",
        data="toy/val",
        backbone="stride 16",
        images=3,
        metric="mIoU",
        higher_is_better=True,
        percent=True,
        upsampler=upsampler,
        score=Estimate(value=score, low=score, high=score),
        versus={},
    )


def test_the_difference_is_the_mean_over_seeds_with_students_interval() -> None:
    [line] = summary((row(*each) for each in SCORES.items()), seeds=2)
    assert line["all taps"] == 63.0
    assert line["seven taps"] == 60.0
    assert line["difference"] == 3.0
    assert line["by seed"] == "+2.000 +4.000"
    # The differences' standard error is 1, and t is 12.706 with one degree of freedom.
    assert line["±"] == pytest.approx(12.706, abs=1e-3)
