"""``featup-hub evaluate``: tables and files; a run that cannot give results is refused at once."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from featup_hub.cli import main
from featup_hub.evaluation.candidates import PlugInError
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.run import evaluate


@pytest.fixture
def oracle(scenes):
    """Runs the oracle with the given options and returns the exit code."""
    line = f"evaluate --data folder:{scenes} --protocols oracle --strides 16 --resamples 20"
    return lambda options: main([*line.split(), *options.split()])


def test_the_command_prints_tables_and_writes_files(oracle, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    assert oracle(f"--upsamplers bilinear guided=joint_bilateral --out {out}") == 0
    printed = capsys.readouterr()
    assert "guided" in printed.out
    assert "100.00  + +50.00 [+50.00, +50.00]" in printed.out
    assert "oracle on" in printed.err
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert content["config"]["upsamplers"] == ["bilinear", "guided=joint_bilateral"]
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", "results.png"}


def test_without_matplotlib_there_are_results_and_a_warning(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert oracle(f"--upsamplers nearest bilinear --out {tmp_path}") == 0
    said = capsys.readouterr().err
    assert "warning: the figure needs matplotlib, which is missing; pip install featup_hub[" in said
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "results.csv"}


def test_a_lone_upsampler_needs_no_figure_and_the_oracle_no_backbone(oracle, tmp_path):
    assert oracle(f"--upsamplers bilinear --backbone nope --out {tmp_path}") == 0
    assert not (tmp_path / "results.png").exists()


def test_with_json_the_standard_output_is_json_alone(oracle, capsys):
    assert oracle("--upsamplers nearest bilinear --json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["upsampler"] for row in rows} == {"nearest", "bilinear"}


DATA = "--data folder:SCENES "


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "--data must be given, as LAYOUT:FOLDER, for oracle, preservation; got none"),
        ("--data nowhere", "--data must be LAYOUT:FOLDER with one of the layouts folder, "),
        ("--upsamplers lanczos", "--upsamplers: an upsampler is one of nearest, "),
        ("--upsamplers no_module:x", "--upsamplers: a plug-in module:callable must be importable"),
        (DATA + "--upsamplers nearest nearest", "--upsamplers must each have a name of its own; "),
        (
            DATA + "folder:SCENES",
            "--data must each have a name of its own; got scenes",
        ),
        (DATA + "--backbone nope", "--backbone: a model must be one of "),
        (DATA + "--looks 1 9", "--looks must be one of 1, 4, 16, 64, 256, the squares of the "),
        (DATA + "--backbone dinov2=no.file", "--backbone: no weights file no.file; check"),
        (
            DATA + "--versus nope --upsamplers nearest bilinear",
            "--versus must name upsamplers that take part, nearest, bilinear; got nope",
        ),
        ("--strides 16 0", "--strides must be at least 1 pixel each; got 16, 0"),
        ("--looks 2", "--looks must be square numbers, 1, 4, 9 …; got 2"),
        (
            DATA + "--protocols cost oracle --looks 4",
            "--looks must include 1 for oracle, which takes features of one look; got 4",
        ),
        ("--probe-steps 0", "--probe-steps must be at least 1; got 0"),
        ("--max-side -5", "--max-side must be at least 0; got -5"),
        ("--protocols cam", "--photos must be given, a folder of photographs, for cam; got None"),
        (
            "--protocols cam --photos SCENES/val/images --classifier jbu",
            "--classifier: a model with a backbone",
        ),
    ],
)
def test_what_was_typed_and_cannot_work_is_told_by_its_flag_with_exit_code_2(
    typed, message, scenes, capsys
):
    assert main(["evaluate", *typed.replace("SCENES", str(scenes)).split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def up(source, image, size):
    raise ValueError("a bug of the user's")


def backbone():
    raise ValueError("a bug of the user's")


@pytest.mark.parametrize(
    "typed",
    [
        "--protocols oracle --upsamplers nearest=tests.evaluation.test_command:up",
        "--protocols cost --backbone tests.evaluation.test_command:backbone",
    ],
)
def test_an_exception_in_a_plug_in_s_own_code_keeps_its_traceback(typed, scenes):
    with pytest.raises(PlugInError, match=r"test_command:.*' raised ValueError") as caught:
        main([*f"evaluate --data folder:{scenes}".split(), *typed.split()])
    assert str(caught.value.__cause__) == "a bug of the user's"


def test_a_plug_in_may_lie_in_the_working_folder(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    code = "def up(source, image, size):\n    return source.new_zeros(1, source.shape[1], *size)\n"
    (tmp_path / "plug_in_of_a_user.py").write_text(code)
    assert oracle("--upsamplers plug_in_of_a_user:up") == 0


@pytest.mark.parametrize("protocols", ["oracle", "cost"])
def test_a_protocol_that_fits_nothing_needs_no_training_images(protocols, scenes, tmp_path):
    (tmp_path / "val").symlink_to(scenes / "val")
    (tmp_path / "dataset.json").symlink_to(scenes / "dataset.json")
    typed = f"evaluate --data folder:{tmp_path} --upsamplers nearest --strides 16 --protocols"
    assert main([*typed.split(), protocols]) == 0
    assert main([*typed.split(), protocols, "preservation"]) == 1


@pytest.mark.filterwarnings("always:labels of two")
def test_masks_of_0_and_255_bring_a_warning(scenes, tmp_path, capsys):
    for name in ("images", "labels"):
        shutil.copytree(scenes / "val" / name, tmp_path / "val" / name)
    (tmp_path / "dataset.json").write_text('{"classes": 2}')
    typed = f"evaluate --data folder:{tmp_path} --upsamplers nearest --strides 16"
    assert main([*typed.split(), "--protocols", "oracle"]) == 0
    assert "warning" not in capsys.readouterr().err
    for value, rest, found in ((255, 0, "class 0 only"), (255, 128, "none")):
        for path in (tmp_path / "val" / "labels").iterdir():
            mask = np.asarray(Image.open(path)) > 0
            Image.fromarray(np.where(mask, value, rest).astype(np.uint8)).save(path)
        assert main([*typed.split(), "--protocols", "oracle"]) == 0
        said = capsys.readouterr().err
        assert "warning: labels of two classes or more are needed" in said
        assert f"have {found}; values outside 0 to 1 are void" in said


@pytest.mark.parametrize("missing", ["data", "file"])
def test_what_files_do_not_hold_is_one_line_and_exit_code_1(missing, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    upsampler = str(damaged) if missing == "file" else "bilinear"
    typed = ["--data", f"camvid:{tmp_path}", "--protocols", "oracle", "--upsamplers", upsampler]
    assert main(["evaluate", *typed]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("protocols", ("oracel",), "must be of oracle, preservation.*; got oracel"),
        ("protocols", (), "must be of oracle.*; got none"),
        ("reductions", ("mean",), "must be of point, area; got mean"),
        ("looks", (), "must be square numbers, .*; got none"),
    ],
)
def test_an_unknown_choice_is_refused(field, value, message):
    with pytest.raises(ValueError, match=f"^{field} {message}"):
        EvaluationConfig(**{field: value})


def test_default_references_may_be_missing_and_others_are_named_as_in_tables(scenes):
    config = EvaluationConfig(
        data=(f"folder:{scenes}",), upsamplers=("plain=bilinear",), protocols=("oracle",)
    )
    evaluate(config)
    evaluate(replace(config, versus=("plain",)))
    with pytest.raises(ValueError, match="take part, plain; got bilinear"):
        evaluate(replace(config, versus=("bilinear",)))
