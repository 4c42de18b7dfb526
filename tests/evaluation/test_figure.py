"""The figure shows every upsampler; an empty figure is an error."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from featup_hub.evaluation.figure import draw
from featup_hub.evaluation.report import rows
from featup_hub.evaluation.statistics import Estimate
from featup_hub.evaluation.sums import Measurement


def scored(*names):
    found = Measurement(protocol="point oracle", data="d/val", backbone="stride 16")
    for index, name in enumerate(names):
        for image in range(4):
            found.add(name, {"band": torch.tensor([50 + 10 * index + image, 100])})
    return rows([found], resamples=20)


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw(scored("bilinear", "ours", "theirs"), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as picture:
        assert min(picture.size) > 100


def test_an_interval_that_does_not_hold_the_value_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    outside = Estimate(value=0.1, low=0.12, high=0.2)
    drawn = [
        replace(row, versus=dict.fromkeys(row.versus, outside))
        for row in scored("bilinear", "ours")
    ]
    draw(drawn, tmp_path / "f.png")
    assert (tmp_path / "f.png").is_file()


def test_without_a_reference_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="needs paired differences; there are none"):
        draw(scored("ours"), tmp_path / "f.png")


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install featup_hub\[eval\]"):
        draw(scored("bilinear", "ours"), tmp_path / "f.png")
