"""The GPU benchmark's results as a page to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def markdown(results: Row) -> str:
    """Writes all results that are there.

    Args:
        results: What :mod:`benchmarks.gpu` collected.
    """
    parts = ["# The CUDA kernels on one card", ""]
    parts += [f"- {key}: {value}" for key, value in results["environment"].items()]
    parts += [f"- {line}" for line in results.get("implementations", [])]
    if speed := results.get("bytes_per_second"):
        parts.append(f"- copy, read and written: {speed / 1e12:.2f} TB/s")
    parts += ["", "## Checks", "", *(_check(*item) for item in results["checks"].items())]
    if rows := results.get("times"):
        parts += ["", "## Stacks, four stages", "", *_table(rows, _stack_columns())]
    if rows := results.get("operations"):
        parts += ["", "## Operations of the last stage", "", *_table(rows, OPERATION_COLUMNS)]
    if results.get("times") and (rows := _baselines(results)):
        parts += ["", "## Others in the same run", "", *_table(rows, BASELINE_COLUMNS)]
    if rows := results.get("grid"):
        parts += ["", "## All sizes", "", *_table(rows, _stack_columns())]
    for name, items in (("Left out", results.get("notes")), ("Errors", results.get("errors"))):
        if items:
            lines = [f"{k}: {v}" for k, v in items.items()] if isinstance(items, dict) else items
            parts += ["", f"## {name}", "", *(f"- {line}" for line in lines)]
    return "\n".join(parts) + "\n"


def _check(name: str, rows: list[Row]) -> str:
    bad = [row for row in rows if not row["ok"]]
    worst = max(
        (value for row in rows for key, value in row.items() if "error" in key), default=None
    )
    line = f"- {name}: {len(rows) - len(bad)} of {len(rows)} passed"
    line += "" if worst is None else f", largest relative error {worst:.1e}"
    summaries = "; ".join(row["summary"] for row in rows if row.get("summary"))
    line += f", {summaries}" if summaries else ""
    return line + "".join(f"\n  - failed: {row}" for row in bad[:5])


def _table(rows: list[Row], columns: list[Column]) -> list[str]:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in rows]
    return lines


def _number(key: str, scale: float = 1) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value * scale:.4g}"

    return show


def _ratio(above: str, below: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        return f"{row[above] / row[below]:.2f}" if row.get(above) and row.get(below) else ""

    return show


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(key, ""))


MIB = 1 / 2**20


def _stack_columns() -> list[Column]:
    return [
        ("case", _text("case")),
        ("forward ms", _number("forward_median_ms")),
        ("as a graph ms", _number("graph_ms")),
        ("floor ms", _number("forward_floor_ms")),
        ("graph / floor", _ratio("graph_ms", "forward_floor_ms")),
        ("peak MiB", _number("forward_peak_bytes", MIB)),
        ("backward ms", _number("backward_median_ms")),
        ("floor ms", _number("backward_floor_ms")),
        ("× floor", _ratio("backward_median_ms", "backward_floor_ms")),
        ("peak MiB", _number("backward_peak_bytes", MIB)),
    ]


OPERATION_COLUMNS: list[Column] = [
    ("case", _text("case")),
    ("operation", _text("operation")),
    ("ms", _number("median_ms")),
    ("floor ms", _number("floor_ms")),
    ("× floor", _ratio("median_ms", "floor_ms")),
]
BASELINE_COLUMNS: list[Column] = [
    ("case", _text("case")),
    ("implementation", _text("impl")),
    ("forward ms", _number("forward_median_ms")),
    ("ours is faster by", _ratio("forward_median_ms", "ours_forward")),
    ("peak MiB", _number("forward_peak_bytes", MIB)),
    ("ours needs 1 /", _ratio("forward_peak_bytes", "ours_peak")),
    ("backward ms", _number("backward_median_ms")),
    ("ours is faster by", _ratio("backward_median_ms", "ours_backward")),
    ("difference", _number("difference")),
]


def _baselines(results: Row) -> list[Row]:
    """Puts every other implementation beside our time of the same case."""
    ours = {row["case"]: row for row in results["times"]}
    rows = []
    for key in ("torch", "upstream", "compiled"):
        for row in results.get(key, []):
            own = ours.get(row["case"], {})
            extra = {
                "ours_forward": own.get("forward_median_ms"),
                "ours_peak": own.get("forward_peak_bytes"),
                "ours_backward": own.get("backward_median_ms"),
            }
            rows.append(row | extra)
    return rows
