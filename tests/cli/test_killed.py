"""A run killed with SIGKILL resumes and gives the results of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from featup_hub.cli import main
from featup_hub.weights import read

IMAGES = 12


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_run_that_was_killed_ends_in_the_results_of_one_that_was_not(tmp_path, stages, capsys):
    photos, whole, out = (tmp_path / name for name in ("photos", "whole", "out"))
    photos.mkdir()
    for shade in range(IMAGES):
        Image.new("RGB", (48, 32), (20 * shade, 90, 40)).save(photos / f"{shade:02}.png")
    line = ["upsample", str(photos), "--upsampler", str(stages), "--size", "32", "--out"]
    assert main([*line, str(whole)]) == 0

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "featup_hub", *line, str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(list(out.glob("*.safetensors"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    kept = len(list(out.glob("[!.]*.png")))
    capsys.readouterr()
    assert main([*line, str(out)]) == 0
    assert f"{IMAGES - kept} written, {kept} kept, 0 failed" in capsys.readouterr().out
    names = [sorted(file.name for file in folder.iterdir()) for folder in (whole, out)]
    assert names[0] == names[1]  # nothing half-written is left
    for file in whole.glob("*.safetensors"):
        assert torch.equal(read(out / file.name)["features"], read(file)["features"])
    for file in whole.glob("*.png"):
        assert (out / file.name).read_bytes() == file.read_bytes()
