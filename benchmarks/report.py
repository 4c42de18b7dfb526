"""Draws every table and picture of measured numbers from the rows in ``benchmarks/results``.

    python -m benchmarks.report

A document marks a table with ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; the text between is
replaced. No number of a table is typed by hand. ``results/runs.json`` holds the command, commit and
hardware of every CSV file; JSON files of ``results/looks``, ``with_peers``, ``propagation``,
``mirrored`` and ``cost`` are what ``benchmarks.evaluate --out`` wrote.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fit import summary
from featup_hub.evaluation.report import Row as Scored
from featup_hub.evaluation.report import draw
from featup_hub.evaluation.statistics import Estimate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "benchmarks/RESULTS.md",
    "benchmarks/LOG.md",
    "docs/howto.md",
    "weights/jbu_denoise.md",
    "weights/jbu_faithful.md",
)
LOWER_IS_BETTER = ("RMSE", "view error", "AbsRel", "Average Drop", "Complexity")
UPSAMPLERS = (
    *("bilinear", "bicubic", "FeatUp MaskCLIP", "AnyUp", "JAFAR"),
    *("jbu_denoise", "jbu_faithful"),
)
TITLES = {
    **{"camvid": "CamVid", "nyu": "NYUv2", "ccp": "CCP", "davis": "DAVIS"},
    **{"consistency": "view error", "propagation": "videos"},
    **{"lite16": "lite0", "lite32": "lite0_stride32"},
    **{"lite2_16": "lite2", "mobilenet16": "mobilenet2"},
}
"""Data sets, protocols and sources of features, as the tables name them."""
DRAWN = ("boundary accuracy", "mIoU", "view error")
SCORES = {"consistency": ("view error",), "propagation": ("boundary accuracy", "J")}
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Reads the rows of a CSV file."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bold_best(values: Sequence[str], score: str) -> list[str]:
    """Sets the best value of a row in bold, whoever reached it; ties are all bold."""
    numbers = [float(value) for value in values if value]
    pick = min if any(name in score for name in LOWER_IS_BETTER) else max
    best = pick(numbers) if numbers else None
    return [f"**{v}**" if v and float(v) == best else v or "–" for v in values]


def title(name: str) -> str:
    """Names a data set, protocol or source of features: ``camvid/val`` is CamVid."""
    name, space, stride = name.removesuffix("/val").partition(" /")
    return TITLES.get(name, name) + space + stride


def headline(protocols: Sequence[str] = ("frozen probe", "consistency")) -> str:
    """Scores on labels, ours beside interpolation, FeatUp's stages and AnyUp.

    A single protocol has no column.
    """
    found: dict[tuple[str, ...], Row] = {}
    for row in [*read("labels.csv"), *read("peers.csv")]:
        key = (row["protocol"], row["data"], row["features"])
        line = found.setdefault(key, {})
        line[f"{row['upsampler']}, {row['score']}"] = row["value"]
    chosen = {
        key: line for protocol in protocols for key, line in found.items() if key[0] == protocol
    }
    return scores_table(chosen, UPSAMPLERS, skip=len(protocols) == 1)


def scores_table(
    found: dict[tuple[str, ...], Row], upsamplers: Sequence[str], skip: bool = False
) -> str:
    """Lays out scores, one line per protocol, data and source of features.

    ``found`` holds values by line, and by ``"upsampler, score"``. With ``skip`` the first column,
    the protocol, is left out.
    """
    lines = []
    for key, line in found.items():
        names = SCORES.get(key[0], ("boundary accuracy", "mIoU"))
        cells = [
            bold_best([line.get(f"{u}, {name}", "") for u in upsamplers], name) for name in names
        ]
        joined = [" / ".join(cell).replace("– / –", "–") for cell in zip(*cells, strict=True)]
        lines.append([*map(title, key[skip:]), *joined])
    return markdown([*("protocol", "data", "features")[skip:], *upsamplers], lines)


def evaluations(folder: str) -> list[dict[str, Any]]:
    """Reads the rows of every evaluation in a folder of the results."""
    files = sorted((RESULTS / folder).glob("*.json"))
    return [row for file in files for row in json.loads(file.read_text("utf-8"))["rows"]]


def four_looks() -> Iterator[tuple[dict[str, Any], str, dict[str, float] | None]]:
    """Yields rows of four looks, the upsampler, and the difference from it with one look.

    The view error's are from bilinear with one look.
    """
    for row in evaluations("looks"):
        upsampler, _, looks = row["upsampler"].partition(" ×")
        if looks == "4" and upsampler != "bilinear":
            reference = "bilinear" if row["metric"] == "view error" else upsampler
            yield row, upsampler, row["versus"].get(reference)


def looks() -> str:
    """Differences of :func:`four_looks`, a line per source of features, upsampler and data set."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row, upsampler, versus in four_looks():
        key = (title(row["backbone"]), upsampler, title(row["data"]), str(row["images"]))
        line = found.setdefault(key, {})
        line[f"{row['protocol']}, {row['metric']}"] = difference(versus)
    columns = {
        f"{probe} probe, {score}": f"{score}, {probe}"
        for score in ("boundary accuracy", "mIoU")
        for probe in ("frozen", "transfer")
    }
    columns["consistency, view error"] = "view error"
    lines = [[*key, *(line.get(name, "–") for name in columns)] for key, line in found.items()]
    return markdown(["features", "upsampler", "data", "images", *columns.values()], lines)


def difference(versus: dict[str, float] | None) -> str:
    """Writes a paired difference with its interval, in percentage points."""
    if not versus:
        return "–"
    value, low, high = (f"{100 * versus[part]:+.1f}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def by_line(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], Row]:
    """Sorts scores of evaluations by protocol, data and source of features."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        line = found.setdefault((row["protocol"], row["data"], row["backbone"]), {})
        line[f"{row['upsampler']}, {row['metric']}"] = f"{100 * row['score']['value']:.2f}"
    return found


def with_peers() -> str:
    """Scores beside AnyUp and JAFAR, one line per protocol, data and source of features."""
    every = [*evaluations("with_peers"), *evaluations("propagation")]
    rows = [row for row in every if row["upsampler"] != "bilinear ×4"]
    return scores_table(by_line(rows), list(dict.fromkeys(row["upsampler"] for row in rows)))


def mirrored() -> str:
    """Scores of EfficientNet-Lite0, and of its average with the mirrored image's features."""
    found = by_line([*evaluations("with_peers"), *evaluations("mirrored")])
    sources = ("lite16 /16", "mirrored16 /16")
    chosen = {k: found[k] for k in sorted(found) if k[0] == "frozen probe" and k[2] in sources}
    return scores_table(chosen, ("bilinear", "jbu_denoise", "jbu_denoise ×4"), skip=True)


def sizes_cost() -> str:
    """CPU time of an output pixel by the size of the image: one column a size."""
    rows = read("cpu_sizes.csv")
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    found = {(row["pass"], row["size"]): row["µs per pixel"] for row in rows}
    passes = dict.fromkeys(row["pass"] for row in rows)
    lines = [[name, *(found.get((name, size), "–") for size in sizes)] for name in passes]
    return markdown(["pass", *sizes], lines)


def costs() -> dict[str, dict[str, dict[str, float]]]:
    """Reads measured costs: by source of features, by upsampler, by what was measured."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in evaluations("cost"):
        source = found.setdefault(title(row["backbone"]), {})
        source.setdefault(row["upsampler"], {})[row["metric"]] = row["score"]["value"]
    return found


def peers_cost() -> str:
    """CPU seconds without and with the backbone, and memory, one line per source of features."""
    found = costs()
    every = dict.fromkeys(name for by_name in found.values() for name in by_name)
    names = [name for name in every if "×" not in name or name == "jbu_denoise ×4"]
    lines = []
    for features, by_name in found.items():
        cells = [
            f"{cost['CPU seconds']:.2f} ({cost['CPU seconds with backbone']:.2f}) s, "
            f"{cost['peak MiB']:.0f} MiB"
            if (cost := by_name.get(name))
            else "–"
            for name in names
        ]
        lines.append([features, *cells])
    return markdown(["features", *names], lines)


def oracle() -> str:
    """The label oracle on BSDS: boundary accuracy and mIoU by upsampler."""
    found: dict[str, dict[str, str]] = {"boundary accuracy": {}, "mIoU": {}}
    for row in evaluations("oracle"):
        value = f"{100 * row['score']['value']:.2f}"
        found.setdefault(row["metric"], {})[row["upsampler"]] = value
    lines = [[name, *bold_best(list(found[name].values()), name)] for name in list(found)[:2]]
    return markdown(["score", *found["mIoU"]], lines)


def fit() -> str:
    """The fit of one image beside interpolation, JBU and FeatUp's network: error of new views."""
    names = ("bilinear", "jbu", "network", "fit")
    lines = []
    for file in sorted((RESULTS / "fit").glob("*.json")):
        kept = json.loads(file.read_text("utf-8"))
        errors = [row["errors"] for row in kept["rows"].values()]
        means = [f"{sum(error[name] for error in errors) / len(errors):.4f}" for name in names]
        found = summary(errors)["below network"]
        low, high = (f"{100 * end:.1f}" for end in found["interval"])
        below = f"{100 * found['mean share']:.1f} % [{low}, {high}]"
        least = f"{100 * found['least share']:.1f} %"
        model = kept["settings"]["model"]
        lines.append([model, str(len(errors)), *bold_best(means, "view error"), below, least])
    below = "fit below network"
    return markdown(["features", "photographs", *names, below, "least"], lines)


def position_embeddings() -> str:
    """What timm's and Meta's resampling of position embeddings change, by the size of the image."""
    rows = read("position_embeddings.csv")
    lines = [
        [f"{r['height']}×{r['width']}", *(v for k, v in r.items() if k not in ("height", "width"))]
        for r in rows
    ]
    return markdown(["image", "embeddings", "features", "cosine"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "readme": lambda: headline(("frozen probe",)),
    "looks": looks,
    "with_peers": with_peers,
    "mirrored": mirrored,
    "fit": fit,
    "sizes_cost": sizes_cost,
    "peers_cost": peers_cost,
    "oracle": oracle,
    "position_embeddings": position_embeddings,
}


def filled(text: str) -> str:
    """Replaces the tables of a document."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- begin {name} -->\n{TABLES[name]()}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", table, text, flags=re.DOTALL)


def draw_intervals(path: Path) -> None:
    """Draws differences from bilinear with their 95 % intervals."""
    rows = [
        Scored(
            protocol=title(row["protocol"]),
            data=title(row["data"]),
            backbone=row["features"],
            images=int(row["images"]),
            metric=row["score"],
            higher_is_better=row["score"] not in LOWER_IS_BETTER,
            percent=True,
            upsampler=row["upsampler"],
            score=Estimate(value=float(row["value"]) / 100, low=0, high=0),
            versus={
                "bilinear": Estimate(
                    value=float(row["difference"]) / 100,
                    low=float(row["low"]) / 100,
                    high=float(row["high"]) / 100,
                )
            },
        )
        for row in read("labels.csv")
        if row["against"] == "bilinear"
        and row["protocol"] in ("frozen probe", "transfer probe", "consistency")
        and row["score"] in DRAWN
    ]
    draw(rows, path)


def draw_looks(path: Path) -> None:
    """Draws the differences of :func:`looks` with their intervals, one colour a protocol."""
    rows = [
        Scored(
            protocol=title(row["backbone"]),
            data=title(row["data"]),
            backbone=upsampler,
            images=row["images"],
            metric=row["metric"].replace("view error", "view error (one look: bilinear)"),
            higher_is_better=row["higher_is_better"],
            percent=True,
            upsampler=title(row["protocol"]),
            score=Estimate(**row["score"]),
            versus={"one look": Estimate(**found)},
        )
        for row, upsampler, found in four_looks()
        if found and upsampler == "jbu_denoise" and row["metric"] in DRAWN
    ]
    draw(rows, path)


def draw_quality(path: Path) -> None:
    """Draws boundary accuracy against CPU time on CamVid, one panel per source of features."""
    import matplotlib
    from matplotlib.figure import Figure

    scores = {
        (row["features"], row["upsampler"]): float(row["value"])
        for row in [*read("labels.csv"), *read("peers.csv")]
        if (row["protocol"], row["data"]) == ("frozen probe", "camvid/val")
        and row["score"] == "boundary accuracy"
    }
    found = costs()
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    for panel, features in zip(figure.subplots(1, len(found)), found, strict=True):
        for name, cost in found[features].items():
            if (features, name) not in scores:
                continue
            place = (cost["CPU seconds with backbone"], scores[features, name])
            panel.plot(*place, "o", color="C1" if "jbu" in name else "C0")
            panel.annotate(name, place, (5, 4), textcoords="offset points", fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(0.05, 40)
        panel.margins(y=0.15)
        panel.set_title(features, fontsize=9)
        panel.set_xlabel("CPU seconds per image, with the backbone", fontsize=8)
    figure.supylabel("boundary accuracy, %", fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "featup_hub", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Fills the documents and draws the pictures."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    draw_intervals(ROOT / "docs" / "intervals.png")
    draw_looks(ROOT / "docs" / "looks_intervals.png")
    draw_quality(ROOT / "docs" / "quality.svg")


if __name__ == "__main__":
    main()
