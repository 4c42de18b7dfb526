"""Table, JSON, CSV and picture agree, and mark the better direction."""

from __future__ import annotations

import csv
import json
import locale
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from featup_hub.evaluation.report import draw, rows, table, write_results
from featup_hub.evaluation.statistics import Estimate
from featup_hub.evaluation.sums import Measurement


@dataclass(frozen=True)
class Config:
    seed: int = 3


def measured(**sums):
    """Sums of every image by upsampler."""
    stacked = {
        name: {key: torch.tensor([each[key] for each in images]) for key in images[0]}
        for name, images in sums.items()
    }
    return [Measurement("frozen probe", "rooms/val", "net /16", 1, stacked)]


@pytest.fixture
def scored():
    return rows(
        measured(
            **{
                name: [
                    {"band": [correct + image, 100], "depth_edges": [10.0, error * 10]}
                    for image in range(5)
                ]
                for name, correct, error in (("bilinear", 60, 4.0), ("ours", 80, 1.0))
            }
        ),
        versus=("bilinear",),
        resamples=100,
    )


def test_the_table_marks_improvements_in_either_direction_and_losses(scored):
    lines = table(scored).splitlines()
    assert lines[0] == "frozen probe · rooms/val · net /16 · 5 images"
    assert lines[1].split() == ["boundary", "accuracy", "↑", "against", "bilinear"]
    assert "82.00  + +20.00 [+20.00, +20.00]" in lines[3]
    assert "1.000  + -1.000 [-1.000, -1.000]" in lines[6]
    long = table([replace(scored[1], metric="CPU seconds with backbone")]).splitlines()
    assert long[1] == "  CPU seconds with backbone ↑ against bilinear"
    assert long[2].index("+ ") == long[1].index("against")
    losing = {n: [{"band": [k, 10]}] * 3 for n, k in (("bilinear", 9), ("worse", 5), ("same", 9))}
    shown = table(rows(measured(**losing), versus=("bilinear",), resamples=50))
    assert "50.00  - -40.00" in shown
    assert "90.00  · +0.00" in shown


def test_an_unknown_interval_is_shown_as_unknown_and_never_as_significant(tmp_path, monkeypatch):
    found = rows(measured(bilinear=[{"band": [3, 10]}], ours=[{"band": [5, 10]}]))
    assert "50.00  · +20.00 [unknown]" in table(found)
    write_results(found, Config(), tmp_path)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["rows"][1]["versus"]["bilinear"]["low"] is None
    axes, texts = pytest.importorskip("matplotlib.axes").Axes, []
    monkeypatch.setattr(axes, "text", lambda _, x, y, text, **kw: texts.append((x, text)))
    draw(found, tmp_path / "f.png")
    assert texts == [(pytest.approx(20), " ?")]


def test_json_holds_rows_configuration_versions_and_null_where_there_is_no_score(scored, tmp_path):
    nothing = {name: [{"band": [0, 0]}] for name in ("bilinear", "ours")}
    write_results([*scored, *rows(measured(**nothing), resamples=5)], Config(), tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["config"] == {"seed": 3}
    assert content["versions"]["torch"] == torch.__version__
    assert content["rows"][1]["versus"]["bilinear"]["value"] == pytest.approx(0.2)
    null = {"value": None, "low": None, "high": None}
    assert (content["rows"][-1]["score"], content["rows"][-1]["versus"]["bilinear"]) == (null, null)
    assert "NaN" not in text


def test_csv_has_one_line_per_score_and_is_utf_8_in_any_locale(scored, tmp_path):
    scored[0] = replace(scored[0], metric="δ<1.25")
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")  # whose encoding is ASCII
        write_results(scored, Config(), tmp_path)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4
    assert lines[0]["metric"] == "δ<1.25"
    assert lines[1]["upsampler"] == "ours"
    assert float(lines[1]["value against bilinear"]) == pytest.approx(0.2)
    assert lines[0]["value against bilinear"] == ""


@pytest.mark.parametrize("interval", [None, Estimate(value=0.1, low=0.12, high=0.2)])
def test_a_picture_is_drawn_also_of_an_interval_without_its_value(scored, tmp_path, interval):
    pytest.importorskip("matplotlib")
    if interval is not None:
        scored = [replace(r, versus=dict.fromkeys(r.versus, interval)) for r in scored]
    draw(scored, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as picture:
        assert min(picture.size) > 100


def test_an_upsampler_may_lack_a_score_of_the_picture(scored, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    legends = []
    monkeypatch.setattr(figure, "legend", lambda _, handles, names, **kw: legends.append(names))
    draw([*scored, replace(scored[3], upsampler="other")], tmp_path / "f.png")
    assert legends == [["ours", "other"]]
