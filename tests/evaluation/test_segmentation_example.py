"""The example trains the parts that it names."""

from __future__ import annotations

import runpy

import pytest
import torch

import featup_hub


@pytest.fixture
def example(root, stages, monkeypatch):
    load = featup_hub.load
    monkeypatch.setattr(featup_hub, "load", lambda name: load(name, upsampler=stages))
    return runpy.run_path(str(root / "examples" / "segmentation_head.py"))


@pytest.mark.parametrize("decoder", ["jbu", "bilinear"])
def test_every_part_learns_and_the_loss_falls(example, decoder, scenes, capsys):
    network = example["build"](2, decoder)
    before = {name: value.clone() for name, value in network.named_parameters()}
    data = example["open_data"](f"folder:{scenes}", "train")
    example["train"](network, data, 8, side=32)
    assert "step 0: loss" in capsys.readouterr().out
    kept = [name for name, value in network.named_parameters() if torch.equal(value, before[name])]
    unused = ("upsampler.upsampler.up", "model.upsampler")  # 2 of 4 stages at 32 px; none
    assert [name for name in kept if not name.startswith(unused)] == []


def test_it_runs_from_the_command_line_to_a_score(example, scenes, capsys):
    example["main"](f"folder:{scenes}", "jbu", "2")
    assert ", mIoU " in capsys.readouterr().out
