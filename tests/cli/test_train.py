"""``featup-hub train``: files that ``upsample`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featup_hub.cli import main
from featup_hub.training import jbu


def test_train_makes_a_file_that_upsample_takes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = "--steps 1 --batch 1 --image-size 32 --views 1 --crf-samples 10 --projection-dim 4"
    line = ["train", str(photos), "--out", str(tmp_path / "run"), *size.split()]
    assert main([*line, "--model", "efficientnet_lite0"]) == 0
    made = tmp_path / "run/jbu.safetensors"
    assert f"wrote {made}" in capsys.readouterr().out
    flags = ["--weights", made, "--out", tmp_path / "out", "--size", 32]
    assert main([str(word) for word in ["upsample", photos / "a.jpg", *flags]]) == 0
    assert main([*line, "--lr", "1"]) == 1
    assert "another config" in capsys.readouterr().err


def test_a_run_that_diverges_is_one_line_and_leaves_no_weights(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = "--steps 9 --batch 1 --image-size 32 --views 1 --crf-samples 10 --projection-dim 4"
    line = ["train", str(photos), "--out", str(tmp_path / "run"), *size.split()]
    assert main([*line, "--lr", "1e9"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: training needs a finite " in err.splitlines()[-1]
    assert "lower lr" in err.splitlines()[-1]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.csv"]


def test_an_interrupted_run_goes_on_as_the_message_says(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = "--steps 3 --batch 1 --image-size 32 --views 1 --crf-samples 10 --projection-dim 4"
    line = ["train", str(photos), "--out", str(tmp_path / "run"), *size.split()]
    step = jbu._Run.step

    def stop(run: jbu._Run, number: int) -> object:
        if number == 2:
            raise KeyboardInterrupt
        return step(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(jbu._Run, "step", stop)
        assert main(line) == 130
    said = "error: interrupted; what is finished is kept; the same command resumes"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2
