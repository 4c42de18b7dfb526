"""Documents show what was measured: their tables are drawn from the rows in benchmarks/results."""

from __future__ import annotations

import json

import pytest

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
    report.draw_intervals(tmp_path / "intervals.svg")
    assert "jbu_denoise" in (tmp_path / "intervals.svg").read_text(encoding="utf-8")
