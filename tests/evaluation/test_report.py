"""Tables, JSON and CSV agree, and mark the better direction."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass

import pytest
import torch

from featup_hub.evaluation.report import rows, table, write_csv, write_json
from featup_hub.evaluation.sums import Measurement


@dataclass(frozen=True)
class Config:
    seed: int = 3


@pytest.fixture
def scored():
    found = Measurement(protocol="frozen probe", data="rooms/val", backbone="net /16")
    for name, correct, error in (("bilinear", 60, 4.0), ("ours", 80, 1.0)):
        for image in range(5):
            found.add(
                name,
                {
                    "band": torch.tensor([correct + image, 100]),
                    "depth_edges": torch.tensor([10.0, error * 10]),
                },
            )
    return rows([found], versus=("bilinear",), resamples=100)


def test_rows_hold_scores_and_paired_differences(scored):
    assert [(row.upsampler, row.metric) for row in scored] == [
        ("bilinear", "boundary accuracy"),
        ("ours", "boundary accuracy"),
        ("bilinear", "edge RMSE"),
        ("ours", "edge RMSE"),
    ]
    ours = scored[1]
    assert ours.score.value == pytest.approx(0.82)
    assert ours.versus["bilinear"].value == pytest.approx(0.2)
    assert ours.images == 5
    assert scored[0].versus == {}


def test_the_table_marks_improvements_in_either_direction(scored):
    lines = table(scored).splitlines()
    assert lines[0] == "frozen probe · rooms/val · net /16 · 5 images"
    assert "boundary accuracy ↑" in lines[1]
    assert "against bilinear" in lines[1]
    assert "82.00  + +20.00 [+20.00, +20.00]" in lines[3]
    assert "1.000  + -1.000 [-1.000, -1.000]" in lines[6]


def test_a_loss_is_marked_as_one(scored):
    turned = rows(
        [
            Measurement(
                protocol="p",
                data="d",
                backbone="b",
                sums={
                    "bilinear": {"band": [torch.tensor([9, 10])] * 3},
                    "worse": {"band": [torch.tensor([5, 10])] * 3},
                    "same": {"band": [torch.tensor([9, 10])] * 3},
                },
            )
        ],
        versus=("bilinear",),
        resamples=50,
    )
    shown = table(turned)
    assert "50.00  - -40.00" in shown
    assert "90.00  · +0.00" in shown


def test_json_has_null_where_there_is_no_score(tmp_path):
    found = Measurement(protocol="frozen probe", data="rooms/val", backbone="net /16")
    for name in ("bilinear", "ours"):
        found.add(name, {"band": torch.tensor([0, 0])})
    write_json(rows([found], resamples=5), Config(), tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    row = json.loads(text)["rows"][1]
    nothing = {"value": None, "low": None, "high": None}
    assert (row["score"], row["versus"]) == (nothing, {"bilinear": nothing})


def test_json_holds_rows_configuration_and_versions(scored, tmp_path):
    write_json(scored, Config(), tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["config"] == {"seed": 3}
    assert content["versions"]["torch"] == torch.__version__
    assert content["rows"][1]["versus"]["bilinear"]["value"] == pytest.approx(0.2)


def test_csv_has_one_line_per_score(scored, tmp_path):
    write_csv(scored, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4
    assert lines[1]["upsampler"] == "ours"
    assert float(lines[1]["value against bilinear"]) == pytest.approx(0.2)
    assert lines[0]["value against bilinear"] == ""
