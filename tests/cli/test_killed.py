"""A run killed with SIGKILL resumes and gives the results of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featup_hub.cli import main
from featup_hub.weights import metadata, read

IMAGES = 24


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for n in range(IMAGES):
        pixels = draw.integers(0, 256, (32, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02}.png")
    return folder


def command(photos: Path, out: Path, stages: Path) -> list[str]:
    flags = ["--out", out, "--upsampler", stages, "--size", 32, "--device", "cpu"]
    return [str(word) for word in ["upsample", photos, *flags]]


def killed_after(count: int, line: list[str], out: Path) -> None:
    """Starts a run and kills it once there are so many files of features."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "featup_hub", *line], env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("*.safetensors"))) < count and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_run_that_was_killed_ends_in_the_results_of_one_that_was_not(
    many: Path, tmp_path: Path, stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(many, whole, stages)) == 0
    line = command(many, out, stages)
    killed_after(5, line, out)
    for file in out.glob("[!.]*.safetensors"):  # whatever has its name is complete
        assert read(file)["features"].shape == (112, 32, 48)
    for file in out.glob("[!.]*.png"):  # and a picture has its features
        assert file.with_suffix(".safetensors").exists()
        with Image.open(file) as picture:
            picture.load()
    finished = len(list(out.glob("[!.]*.png")))
    assert finished < IMAGES
    capsys.readouterr()
    assert main(line) == 0
    assert f"{IMAGES - finished} written, {finished} kept, 0 failed" in capsys.readouterr().out
    names = [sorted(file.name for file in folder.iterdir()) for folder in (whole, out)]
    assert names[0] == names[1]  # nor is anything half-written left
    assert len(names[0]) == 2 * IMAGES
    for file in whole.glob("*.safetensors"):
        other = out / file.name
        assert torch.equal(read(other)["features"], read(file)["features"])
        assert metadata(other) == metadata(file)
    for file in whole.glob("*.png"):
        assert (out / file.name).read_bytes() == file.read_bytes()
