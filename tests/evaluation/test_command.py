"""``featup-hub evaluate``: tables as they come, files beside them."""

from __future__ import annotations

import json

import pytest

from featup_hub.cli import main


def test_the_command_prints_tables_and_writes_files(scenes, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    code = main(
        f"evaluate --data folder:{scenes} --protocols oracle --strides 16 --resamples 20 "
        f"--upsamplers bilinear guided=joint_bilateral --out {out}".split()
    )
    printed = capsys.readouterr()
    assert code == 0
    assert "guided" in printed.out
    assert "100.00  + +50.00 [+50.00, +50.00]" in printed.out
    assert "oracle on" in printed.err
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert content["config"]["upsamplers"] == ["bilinear", "guided=joint_bilateral"]
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", "results.png"}


def test_a_lone_upsampler_needs_no_figure(scenes, tmp_path, capsys):
    code = main(
        f"evaluate --data folder:{scenes} --protocols oracle --strides 16 --resamples 5 "
        f"--upsamplers bilinear --out {tmp_path}".split()
    )
    assert code == 0
    assert not (tmp_path / "results.png").exists()


def test_a_mistake_is_one_line(capsys):
    assert main(["evaluate", "--data", "nowhere"]) == 1
    assert "data must be LAYOUT:FOLDER" in capsys.readouterr().err
