"""``featup-hub train``: files that ``upsample`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featup_hub.training import jbu
from tests.cli.conftest import Command

SMALL = "--batch 1 --image-size 32 --views 1 --crf-samples 10 --projection-dim 4"
TRAIN = f"train photos --out run {SMALL} --steps"


def test_train_makes_a_file_that_upsample_takes(photos: Path, command: Command) -> None:
    done = command(TRAIN, "1 --model efficientnet_lite0")
    assert (done.code, done.out) == (0, "wrote run/jbu.safetensors\n")
    flags = "--upsampler run/jbu.safetensors --out out --size 32"
    assert command("upsample photos/a.jpg", flags).code == 0
    done = command(TRAIN, "1 --lr 1")
    assert done.code == 1
    assert "another config" in done.err


def test_a_run_that_diverges_is_one_line_and_leaves_no_weights(
    photos: Path, command: Command
) -> None:
    done = command(TRAIN, "9 --lr 1e9")
    assert (done.code, done.out) == (1, "")
    assert "error: training needs a finite " in done.err.splitlines()[-1]
    assert "lower lr" in done.err.splitlines()[-1]
    assert [file.name for file in Path("run").iterdir()] == ["metrics.csv"]


def test_an_interrupted_run_goes_on_by_the_same_command(
    photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = jbu._Run.step

    def stop(run: jbu._Run, number: int) -> object:
        if number == 2:
            raise KeyboardInterrupt
        return step(run, number)

    monkeypatch.setattr(jbu._Run, "step", stop)
    done = command(TRAIN, "3")
    said = "error: interrupted; what is finished is kept"
    assert (done.code, done.err.splitlines()[-1]) == (130, said)
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
