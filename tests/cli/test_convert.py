"""``featup-hub convert``: files that ``upsample`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featup_hub import JBUStack
from featup_hub.cli import main
from featup_hub.weights import read


@pytest.mark.parametrize("norm", [False, True])
def test_convert_makes_a_file_that_upsample_takes(
    norm: bool, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = JBUStack(112).state_dict()
    state = {f"upsampler.{name}": tensor for name, tensor in stack.items()}
    if norm:
        state |= {"model.1.norm.weight": torch.ones(112), "model.1.norm.bias": torch.zeros(112)}
    torch.save({"state_dict": state}, tmp_path / "in.ckpt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "in.ckpt"), str(out)]) == 0
    said = capsys.readouterr().out
    assert "an upsampler for 112 channels" in said
    assert ("without a channel norm" in said) == ("--no-norm" in said) == (not norm)
    assert all(torch.equal(read(out)[name], tensor) for name, tensor in stack.items())
    flags = ["--weights", out, "--out", tmp_path / "out", "--size", 32]
    line = ["upsample", photos / "a.jpg", *flags, *([] if norm else ["--no-norm"])]
    assert main([str(word) for word in line]) == 0


def test_convert_refuses_what_it_cannot_read_or_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "missing.ckpt", str(tmp_path / "x.safetensors")]) == 1
    assert "no weights file missing.ckpt" in capsys.readouterr().err
    assert main(["convert", "in.ckpt", "in.ckpt"]) == 2
    assert "must be named *.safetensors; got in.ckpt" in capsys.readouterr().err
