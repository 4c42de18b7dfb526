"""Measurements as scores: a table for the terminal, JSON, CSV, and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featup_hub import __version__
from featup_hub.evaluation.scores import METRICS
from featup_hub.evaluation.statistics import Estimate, estimate
from featup_hub.evaluation.sums import Measurement
from featup_hub.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class Row:
    """One score of one upsampler; see :class:`Measurement` and :class:`Metric`."""

    protocol: str
    data: str
    backbone: str
    images: int  # that were scored
    metric: str
    higher_is_better: bool
    percent: bool
    upsampler: str
    score: Estimate
    versus: dict[str, Estimate]  # reference upsampler -> paired difference from it

    @property
    def scale(self) -> float:
        """The factor by which a score is shown, 100 for percent."""
        return 100.0 if self.percent else 1.0


def rows(
    measurements: Iterable[Measurement],
    *,
    versus: Sequence[str] = ("bilinear", "bicubic"),
    resamples: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """Scores measurements: one row per measurement, score and upsampler.

    ``versus`` names the references of the paired differences; those not measured are left out.
    ``resamples`` and ``seed`` are those of the bootstrap.
    """
    scored = []
    for found, metric in product(measurements, METRICS):
        own = {name: sums[metric.sums] for name, sums in found.sums.items() if metric.sums in sums}
        score = partial(estimate, metric, block=found.block, resamples=resamples, seed=seed)
        for upsampler, sums in own.items():
            row = Row(
                protocol=found.protocol,
                data=found.data,
                backbone=found.backbone,
                images=len(sums),
                metric=metric.name,
                higher_is_better=metric.higher_is_better,
                percent=metric.percent,
                upsampler=upsampler,
                score=score(sums),
                versus={
                    name: score(sums, own[name])
                    for name in versus
                    if name in own and name != upsampler
                },
            )
            scored.append(row)
    return scored


def table(scored: Sequence[Row]) -> str:
    """Lays rows out for the terminal.

    Shares are shown in percent. If the interval of a paired difference excludes zero, ``+`` marks
    an improvement and ``-`` a loss.
    """
    # A score's name and its arrow fit into the column of upsamplers and that of scores.
    width = max((max(len(row.upsampler), len(row.metric) - 9) for row in scored), default=0)
    references = max((list(row.versus) for row in scored), key=len, default=[])
    lines: list[str] = []
    previous: tuple[str, ...] = ()
    for row in scored:
        block = (row.protocol, row.data, row.backbone)
        if block != previous[:3]:
            lines += ["", f"{row.protocol} · {row.data} · {row.backbone} · {row.images} images"]
        if (*block, row.metric) != previous:
            names = "".join(f"{f'against {name}':<27}" for name in references)
            arrow = "↑" if row.higher_is_better else "↓"
            lines.append(f"  {f'{row.metric} {arrow}':<{width + 12}}{names}".rstrip())
        previous = (*block, row.metric)
        lines.append(f"    {row.upsampler:<{width}}{''.join(_cells(row, references))}".rstrip())
    return "\n".join(lines).lstrip("\n")


def _cells(row: Row, references: Sequence[str]) -> Iterator[str]:
    scale, digits = row.scale, 2 if row.percent else 3
    yield f"{row.score.value * scale:8.{digits}f}  "
    for name in references:
        cell = ""
        if difference := row.versus.get(name):
            value, low, high = (f"{x * scale:+.{digits}f}" for x in vars(difference).values())
            better = (difference.value > 0) == row.higher_is_better
            mark = ("+" if better else "-") if difference.significant else "·"
            known = math.isfinite(difference.low)
            cell = f"{mark} {value} " + (f"[{low}, {high}]" if known else "[unknown]")
        yield f"{cell:<27}"


def as_json(scored: Sequence[Row], config: DataclassInstance) -> str:
    """Returns the rows, the configuration and versions; scores that are not finite are null."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: known(each) for key, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {
        "config": asdict(config),
        "versions": {"featup_hub": __version__, "torch": torch.__version__},
        "rows": [known(asdict(row)) for row in scored],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str, allow_nan=False)


def write_results(scored: Sequence[Row], config: DataclassInstance, folder: Path) -> None:
    """Writes ``results.json`` and ``results.csv``.

    The CSV file has one line per score; each reference has columns for its paired differences.
    """
    with write_atomically(folder / "results.json") as temporary:
        temporary.write_text(as_json(scored, config) + "\n", encoding="utf-8")
    references = sorted({name for row in scored for name in row.versus})
    head = ["protocol", "data", "backbone", "images", "metric", "upsampler", "value", "low", "high"]
    head += [f"{part} against {name}" for name in references for part in ("value", "low", "high")]
    with (
        write_atomically(folder / "results.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(head)
        for row in scored:
            names = [getattr(row, name) for name in head[:6]]
            estimates = [row.score, *(row.versus.get(name) for name in references)]
            numbers = [vars(each).values() if each else ("", "", "") for each in estimates]
            writer.writerow([*names, *chain.from_iterable(numbers)])


def draw(scored: Sequence[Row], path: Path) -> None:
    """Draws every upsampler's difference from the first reference, with its interval, as a PNG.

    One panel per score; right is better; "?" stands beside a difference of unknown interval. Rows
    without a paired difference are not drawn; there must be one that has it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the figure needs matplotlib, which is missing; pip install featup_hub[eval]"
        ) from error

    drawn = [row for row in scored if row.versus]
    reference = max((list(row.versus) for row in drawn), key=len)[0]
    drawn = [row for row in drawn if reference in row.versus]
    metrics = list(dict.fromkeys(row.metric for row in drawn))
    upsamplers = list(dict.fromkeys(row.upsampler for row in drawn))
    blocks = list(dict.fromkeys(_block(row) for row in drawn))
    height = 1.5 + 0.16 * len(blocks) * (len(upsamplers) + 1)
    figure = Figure(figsize=(3.4 * len(metrics) + 2.5, height), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for number, upsampler in enumerate(upsamplers):
            chosen = [row for row in drawn if (row.metric, row.upsampler) == (metric, upsampler)]
            if not chosen:
                continue
            offset = 0.8 * (number + 0.5) / len(upsamplers) - 0.4
            places = [blocks.index(_block(row)) + offset for row in chosen]
            # Signed so that more is better.
            sign = chosen[0].scale if chosen[0].higher_is_better else -chosen[0].scale
            found = [row.versus[reference] for row in chosen]
            values, low, high = (
                [sign * getattr(each, name) for each in found] for name in ("value", "low", "high")
            )
            style = {"linewidth": 1, "color": f"C{number}"}
            panel.hlines(places, low, high, **style)
            panel.plot(values, places, "o", markersize=3, label=upsampler, **style)
            for value, place, end in zip(values, places, low, strict=True):
                if math.isnan(end):
                    panel.text(value, place, " ?", fontsize=7, verticalalignment="center")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{metric}: better than {reference} →", fontsize=9)
        panel.tick_params(labelsize=8)
        if all(row.percent for row in drawn if row.metric == metric):
            panel.set_xlabel("percentage points, 95 % interval", fontsize=8)
    panels[0].set_yticks(range(len(blocks)), blocks)
    panels[0].invert_yaxis()
    # A panel lacks the upsamplers without its score.
    shown = {k: v for p in panels for v, k in zip(*p.get_legend_handles_labels(), strict=True)}
    names, handles = list(shown), list(shown.values())
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _block(row: Row) -> str:
    return f"{row.protocol}\n{row.data} · {row.backbone}"
