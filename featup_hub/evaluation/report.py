"""Measurements as a table for the terminal, as JSON and as CSV rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featup_hub import __version__
from featup_hub.evaluation.cam import CAM
from featup_hub.evaluation.consistency import CONSISTENCY
from featup_hub.evaluation.cost import COST
from featup_hub.evaluation.depth import DEPTH
from featup_hub.evaluation.propagation import PROPAGATION
from featup_hub.evaluation.segmentation import SEGMENTATION
from featup_hub.evaluation.statistics import Estimate, Metric, compare, estimate
from featup_hub.evaluation.sums import Measurement
from featup_hub.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["METRICS", "Row", "as_json", "rows", "scale_of", "table", "write_csv", "write_json"]


METRICS = (*PROPAGATION, *SEGMENTATION, *DEPTH, *CAM, *CONSISTENCY, *COST)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One score of one upsampler.

    Attributes:
        protocol: Such as ``oracle point``.
        data: Such as ``camvid/val``.
        backbone: Backbone of the features, and the stride.
        images: How many images were scored.
        metric: Name of the score.
        higher_is_better: Direction of improvement.
        percent: Whether it is a share, to be shown in percent.
        upsampler: Name of the upsampler.
        score: The score.
        versus: Reference upsampler -> paired difference from it.
    """

    protocol: str
    data: str
    backbone: str
    images: int
    metric: str
    higher_is_better: bool
    percent: bool
    upsampler: str
    score: Estimate
    versus: dict[str, Estimate]


def rows(
    measurements: Iterable[Measurement],
    *,
    versus: Sequence[str] = ("bilinear", "bicubic"),
    metrics: Sequence[Metric] = METRICS,
    resamples: int = 1000,
) -> list[Row]:
    """Scores measurements, with 95 % intervals over images.

    Args:
        measurements: Results of the protocols.
        versus: References of the paired differences; only those measured are used.
        metrics: Scores to compute, if their sums were measured.
        resamples: Bootstrap replicates.

    Returns:
        One row per measurement, score and upsampler.
    """
    return [
        _row(measurement, metric, upsampler, versus, resamples)
        for measurement in measurements
        for metric in metrics
        for upsampler, sums in measurement.sums.items()
        if metric.sums in sums
    ]


def _row(
    found: Measurement, metric: Metric, upsampler: str, versus: Sequence[str], resamples: int
) -> Row:
    stacked = {
        name: torch.stack(sums[metric.sums])
        for name, sums in found.sums.items()
        if name == upsampler or name in versus
    }
    differences = {
        name: compare(
            metric, stacked[upsampler], stacked[name], resamples=resamples, block=found.block
        )
        for name in versus
        if name in stacked and name != upsampler
    }
    return Row(
        protocol=found.protocol,
        data=found.data,
        backbone=found.backbone,
        images=stacked[upsampler].shape[0],
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        percent=metric.percent,
        upsampler=upsampler,
        score=estimate(metric, stacked[upsampler], resamples=resamples, block=found.block),
        versus=differences,
    )


def table(scored: Sequence[Row]) -> str:
    """Lays rows out for the terminal.

    Shares are shown in percent. If the interval of a paired difference excludes zero, ``+`` marks
    an improvement and ``-`` a loss.
    """
    width = max((len(row.upsampler) for row in scored), default=0)
    references = max((list(row.versus) for row in scored), key=len, default=[])
    lines: list[str] = []
    previous: tuple[str, ...] = ()
    for row in scored:
        block = (row.protocol, row.data, row.backbone)
        if block != previous[:3]:
            lines += ["", f"{row.protocol} · {row.data} · {row.backbone} · {row.images} images"]
        if (*block, row.metric) != previous:
            names = "".join(f"{f'against {name}':<27}" for name in references)
            lines.append(f"  {f'{row.metric} {_arrow(row)}':<{width + 12}}{names}".rstrip())
        previous = (*block, row.metric)
        cells = "".join(_cells(row, references))
        lines.append(f"    {row.upsampler:<{width}}{cells}".rstrip())
    return "\n".join(lines).lstrip("\n")


def scale_of(row: Row) -> tuple[float, int]:
    """Returns the display factor of a score (100 for percent) and its digits."""
    return (100.0, 2) if row.percent else (1.0, 3)


def _arrow(row: Row) -> str:
    return "↑" if row.higher_is_better else "↓"


def _cells(row: Row, references: Sequence[str]) -> Iterator[str]:
    scale, digits = scale_of(row)
    yield f"{row.score.value * scale:8.{digits}f}  "
    for name in references:
        if name not in row.versus:
            yield " " * 27
            continue
        difference = row.versus[name]
        value, low, high = (
            f"{x * scale:+.{digits}f}" for x in (difference.value, difference.low, difference.high)
        )
        better = (difference.value > 0) == row.higher_is_better
        mark = ("+" if better else "-") if difference.significant else "·"
        yield f"{f'{mark} {value} [{low}, {high}]':<27}"


def write_json(scored: Sequence[Row], config: DataclassInstance, path: Path) -> None:
    """Writes :func:`as_json` to a file."""
    with write_atomically(path) as temporary:
        temporary.write_text(as_json(scored, config) + "\n", encoding="utf-8")


def as_json(scored: Sequence[Row], config: DataclassInstance) -> str:
    """Returns the rows, the configuration and versions; scores that are not finite are null."""
    content = {
        "config": asdict(config),
        "versions": {"featup_hub": __version__, "torch": torch.__version__},
        "rows": [_numbers(asdict(row)) for row in scored],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str, allow_nan=False)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Replaces numbers that are not finite, which JSON cannot hold, by None."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return _numbers(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: known(value) for key, value in row.items()}


def write_csv(scored: Sequence[Row], path: Path) -> None:
    """Writes one line per score; each reference has columns for its paired differences."""
    references = sorted({name for row in scored for name in row.versus})
    head = ["protocol", "data", "backbone", "images", "metric", "upsampler", "value", "low", "high"]
    head += [f"{part} against {name}" for name in references for part in ("value", "low", "high")]
    with write_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for row in scored:
            names = (row.protocol, row.data, row.backbone, row.images, row.metric, row.upsampler)
            estimates = [row.score, *(row.versus.get(name) for name in references)]
            numbers = [(e.value, e.low, e.high) if e else ("", "", "") for e in estimates]
            writer.writerow([*names, *chain.from_iterable(numbers)])
