"""``featup-hub evaluate``: tables and result files."""

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


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "--data must be given, as LAYOUT:FOLDER, for oracle, preservation; got none"),
        ("--data nowhere", "--data must be LAYOUT:FOLDER with one of the layouts folder, "),
        ("--upsamplers lanczos", "--upsamplers: an upsampler is one of nearest, "),
        ("--upsamplers :x", "--upsamplers: an upsampler is one of nearest, "),
        ("--upsamplers .a:x", "--upsamplers: an upsampler is one of nearest, "),
        ("--upsamplers no_module:x", "--upsamplers: a plug-in module:callable must be importable"),
        ("--data nyu:x --backbones nope", "--backbone: a model must be one of "),
        ("--data nyu:x --backbones jbu", "--backbone: a model with a backbone is needed; got"),
        ("--data nyu:x --backbones dinov2@no.file", "--backbone: no weights file no.file; check"),
        ("--data nyu:x --backbone dinov2=no.file", "--backbone: no weights file no.file; check"),
        ("--protocols cam", "--photos must be given, a folder of photographs, for cam; got none"),
        ("--protocols cam --photos x --classifier no", "--classifier: a model must be one of "),
        ("--protocols cam --photos x --classifier jbu", "--classifier: class activation maps need"),
    ],
)
def test_what_was_typed_and_cannot_work_is_exit_code_2(typed, message, capsys):
    assert main(["evaluate", *typed.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("missing", ["data", "file"])
def test_what_files_do_not_hold_is_one_line_and_exit_code_1(missing, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    upsampler = str(damaged) if missing == "file" else "bilinear"
    typed = ["--data", f"camvid:{tmp_path}", "--protocols", "oracle", "--upsamplers", upsampler]
    assert main(["evaluate", *typed]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_backbones_are_no_matter_where_nothing_looks_through_them(scenes):
    typed = "--protocols oracle --strides 16 --upsamplers nearest --resamples 2 --backbones nope"
    assert main(["evaluate", "--data", f"folder:{scenes}", *typed.split()]) == 0


def test_with_json_the_standard_output_is_json_alone(scenes, capsys):
    typed = "--protocols oracle --strides 16 --upsamplers nearest bilinear --resamples 2 --json"
    assert main(["evaluate", "--data", f"folder:{scenes}", *typed.split()]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["upsampler"] for row in rows} == {"nearest", "bilinear"}
