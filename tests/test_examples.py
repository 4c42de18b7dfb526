"""Examples run and are short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

import featup_hub
from featup_hub.weights import write


def test_quickstart_draws_a_picture(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, picture = tmp_path / "stages.safetensors", tmp_path / "features.png"
    write(featup_hub.JBUStack().state_dict(), stages)
    load = featup_hub.load
    monkeypatch.setattr(featup_hub, "load", lambda name: load(name, weights=stages))
    example = root / "examples/quickstart.py"
    runpy.run_path(str(example))["main"](picture=picture)
    assert capsys.readouterr().out == "(1, 112, 14, 21) -> (1, 112, 224, 336)\n"
    with Image.open(picture) as drawn:
        assert drawn.size == (708, 524)
    assert len(example.read_text().splitlines()) < 40


def test_an_example_that_needs_arguments_shows_its_usage(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = root / "examples/segmentation_head.py"
    monkeypatch.setattr("sys.argv", [str(example)])
    with pytest.raises(
        SystemExit, match=r"Run: python examples/segmentation_head\.py LAYOUT:FOLDER"
    ):
        runpy.run_path(str(example), run_name="__main__")
