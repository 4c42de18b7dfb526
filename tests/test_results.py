"""Tables in documents equal the rows in benchmarks/results."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks import report


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_the_tables_of_a_document_are_those_of_the_rows(name, root):
    text = (root / name).read_text(encoding="utf-8")
    assert report.filled(text) == text, "run: python -m benchmarks.report"


def test_results_are_one_page(root):
    text = (root / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120


def test_every_file_of_rows_has_its_command_commit_and_hardware():
    known = json.loads((report.RESULTS / "runs.json").read_text(encoding="utf-8"))
    assert {path.name for path in report.RESULTS.glob("*.csv")} == set(known)
    for run in known.values():
        assert all(run[key] for key in ("title", "command", "commit", "hardware"))


def test_the_best_of_a_row_is_bold_whoever_reached_it():
    assert report.bold_best(["1.0", "3.0", "", "3.0"], "mIoU") == ["1.0", "**3.0**", "–", "**3.0**"]
    assert report.bold_best(["1.0", "3.0"], "view error") == ["**1.0**", "3.0"]


def test_the_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw_intervals(tmp_path / "intervals.png")
    with Image.open(tmp_path / "intervals.png") as picture:
        assert min(picture.size) > 100
    report.draw_looks(tmp_path / "looks.png")
    with Image.open(tmp_path / "looks.png") as picture:
        assert min(picture.size) > 100
    report.draw_quality(tmp_path / "quality.svg")
    assert "AnyUp" in (tmp_path / "quality.svg").read_text(encoding="utf-8")


def evaluated(protocol, metric, scores, *, percent=True):
    """Rows as ``benchmarks.evaluate --out`` writes them, with a difference from jbu_denoise."""
    return [
        {
            "protocol": protocol,
            "data": "camvid/val",
            "backbone": "net /16",
            "images": 20,
            "metric": metric,
            "percent": percent,
            "upsampler": name,
            "score": {"value": value, "low": value - 0.01, "high": value + 0.01},
            "versus": {"jbu_denoise": {"value": value - 0.5, "low": -0.01, "high": 0.2}},
        }
        for name, value in scores.items()
    ]


@pytest.fixture
def rows_in(tmp_path, monkeypatch):
    """Writes rows into a folder of results of their own."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(folder, rows):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")

    return write


def test_looks_have_a_line_per_source_upsampler_and_data_set(rows_in):
    scores = {"bilinear": 0.4, "bilinear ×4": 0.5, "jbu_denoise": 0.5, "jbu_denoise ×4": 0.6}
    rows_in("looks", evaluated("frozen probe", "mIoU", scores))
    assert report.looks().splitlines()[2:] == [
        "| net /16 | jbu_denoise | CamVid | 20 | – | – | +10.0 [-1.0, +20.0] | – | – |"
    ]


def test_peers_have_a_line_per_protocol_data_and_source_with_the_best_in_bold(rows_in):
    scores = {"jbu_denoise": 0.5, "AnyUp": 0.6}
    rows_in("with_peers", evaluated("frozen probe", "mIoU", scores))
    videos = ("boundary accuracy", "J")
    rows_in("propagation", [r for m in videos for r in evaluated("propagation", m, scores)])
    assert report.with_peers().splitlines()[2:] == [
        "| frozen probe | CamVid | net /16 | – / 50.00 | – / **60.00** |",
        "| videos | CamVid | net /16 | 50.00 / 50.00 | **60.00** / **60.00** |",
    ]
