"""The figure: paired differences with their intervals, one panel per score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featup_hub.evaluation.report import Row, scale_of
from featup_hub.files import write_atomically

__all__ = ["draw"]


def draw(scored: Sequence[Row], path: Path) -> None:
    """Draws every upsampler's difference from the first reference; right is better.

    Args:
        scored: Rows; rows without a paired difference are not drawn.
        path: The PNG file to write.

    Raises:
        ValueError: If no row has a paired difference.
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the figure needs matplotlib, which is missing; pip install featup_hub[eval]"
        ) from error

    drawn = [row for row in scored if row.versus]
    if not drawn:
        raise ValueError(
            "a figure needs paired differences; there are none; evaluate a reference "
            "(such as bilinear) and another upsampler in one run"
        )
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
            rows = [row for row in drawn if (row.metric, row.upsampler) == (metric, upsampler)]
            if not rows:
                continue
            values, left, right = zip(*(_rightwards(row, reference) for row in rows), strict=True)
            offset = 0.8 * (number + 0.5) / len(upsamplers) - 0.4
            panel.errorbar(
                values,
                [blocks.index(_block(row)) + offset for row in rows],
                xerr=[left, right],
                fmt="o",
                markersize=3,
                linewidth=1,
                color=f"C{number}",
                label=upsampler,
            )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{metric}: better than {reference} →", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(blocks)), blocks)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _rightwards(row: Row, reference: str) -> tuple[float, float, float]:
    """Returns a difference, signed so that more is better, and its reach to either side.

    A percentile interval may miss the value: replicates of mIoU may lack rare classes.
    """
    found, (scale, _) = row.versus[reference], scale_of(row)
    below, above = max(found.value - found.low, 0.0), max(found.high - found.value, 0.0)
    if not row.higher_is_better:
        return -scale * found.value, scale * above, scale * below
    return scale * found.value, scale * below, scale * above


def _block(row: Row) -> str:
    return f"{row.protocol}\n{row.data} · {row.backbone}"
