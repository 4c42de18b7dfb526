"""Examples run and are short."""

from __future__ import annotations

import runpy

import pytest
from PIL import Image


def test_quickstart_draws_a_picture(root, tmp_path, capsys):
    picture = tmp_path / "features.png"
    example = root / "examples/quickstart.py"
    runpy.run_path(str(example))["main"](picture=picture)
    assert capsys.readouterr().out == "(1, 112, 14, 21) -> (1, 112, 224, 336)\n"
    with Image.open(picture) as drawn:
        assert drawn.size == (708, 524)
    assert len(example.read_text().splitlines()) < 40


@pytest.mark.parametrize("typed", [[], ["camvid:.", "bicubic"]])
def test_an_example_shows_its_usage_for_wrong_arguments(typed, root, monkeypatch):
    example = root / "examples/segmentation_head.py"
    monkeypatch.setattr("sys.argv", [str(example), *typed])
    with pytest.raises(SystemExit, match=r"Run: python examples/segmentation_head\.py LAYOUT:F"):
        runpy.run_path(str(example), run_name="__main__")
