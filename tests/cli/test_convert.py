"""``featup-hub convert``: files that ``upsample`` takes."""

from __future__ import annotations

import pytest
import torch

from featup_hub import JBUStack
from featup_hub.weights import read


@pytest.mark.parametrize("norm", [False, True])
def test_convert_makes_a_file_that_upsample_takes(norm, photos, command):
    stack = JBUStack(112).state_dict()
    state = {f"upsampler.{name}": tensor for name, tensor in stack.items()}
    if norm:
        state |= {"model.1.norm.weight": torch.ones(112), "model.1.norm.bias": torch.zeros(112)}
    torch.save({"state_dict": state}, "in.ckpt")
    code, said, _ = command("convert in.ckpt out.safetensors")
    assert code == 0
    assert "an upsampler for 112 channels" in said
    assert ("without a channel norm" in said) == ("--no-norm" in said) == (not norm)
    made = read("out.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in stack.items())
    flags = "--upsampler out.safetensors --out out --size 32" + ("" if norm else " --no-norm")
    assert command("upsample photos/a.jpg", flags).code == 0


def test_convert_refuses_what_it_cannot_read_or_write(photos, command):
    done = command("convert missing.ckpt x.safetensors")
    assert done.code == 1
    assert "no weights file missing.ckpt" in done.err
    done = command("convert in.ckpt in.ckpt")
    assert done.code == 2
    assert "must be named *.safetensors; got in.ckpt" in done.err
