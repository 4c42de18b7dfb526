"""Outputs of ``upsample``: kept, made, or refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from featup_hub import JBUStack
from featup_hub.weights import write


def test_a_second_run_keeps_what_is_finished_and_makes_what_is_missing(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    loads: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    upsample(photos)
    first = (tmp_path / "out/a.safetensors").stat().st_mtime_ns
    (tmp_path / "out/b.png").unlink()
    capsys.readouterr()
    assert upsample(photos) == 0
    out = capsys.readouterr().out
    assert "kept 2 finished outputs; --overwrite replaces" in out
    assert "1 written, 2 kept, 0 failed" in out
    assert (tmp_path / "out/a.safetensors").stat().st_mtime_ns == first
    assert (tmp_path / "out/b.png").exists()
    assert upsample(photos) == 0
    assert len(loads) == 2  # nothing to do: no model
    assert upsample(photos, "--overwrite") == 0
    assert (tmp_path / "out/a.safetensors").stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--size", "48"], "made with size 32, not 48"),
        (["--model", "vit"], "made with model efficientnet_lite0, not vit"),
    ],
)
def test_outputs_of_other_settings_are_neither_kept_nor_replaced(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    message: str,
) -> None:
    upsample(photos / "a.jpg")
    before = (tmp_path / "out/a.safetensors").read_bytes()
    assert upsample(photos / "a.jpg", *changed) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "out/a.safetensors").read_bytes() == before
    assert upsample(photos / "a.jpg", *changed, "--overwrite") == 0


def test_outputs_of_another_upsampler_or_another_program_are_not_kept(
    upsample: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upsample(photos / "a.jpg")
    torch.manual_seed(99)  # other weights than those of the stages
    write(JBUStack().state_dict(), tmp_path / "other.safetensors")
    assert upsample(photos / "a.jpg", "--weights", tmp_path / "other.safetensors") == 1
    assert "made with upsampler" in capsys.readouterr().err
    (tmp_path / "out/a.safetensors").write_text("something else")
    assert upsample(photos / "a.jpg") == 1
    assert "is not a safetensors file; --overwrite replaces it" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_finished_and_leaves_nothing_half_written(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def save(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    upsample(photos / "a.jpg")
    monkeypatch.setattr("featup_hub.weights.write", save)
    assert upsample(photos) == 130
    assert "error: interrupted; what is finished is kept" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.safetensors", "a.png"}


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_picture_of_somebody_else_s_is_not_replaced(
    form: str, upsample: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes((photos / "b.png").read_bytes())
    arguments = (photos / "a.jpg", "--out", tmp_path, "--format", form)
    assert upsample(*arguments) == 1
    err = capsys.readouterr().err
    assert f"{picture} exists without features" in err
    assert "--overwrite replaces it, another --out keeps both" in err
    assert picture.read_bytes() == (photos / "b.png").read_bytes()
    assert not picture.with_suffix(f".{form}").exists()
    assert upsample(*arguments, "--no-picture") == 0
    assert upsample(*arguments, "--overwrite") == 0
    assert picture.read_bytes() != (photos / "b.png").read_bytes()


def test_a_picture_of_features_in_the_other_format_is_made_anew(
    upsample: Any, photos: Path, tmp_path: Path
) -> None:
    assert upsample(photos / "a.jpg", "--format", "npy") == 0
    assert upsample(photos / "a.jpg") == 0
    assert (tmp_path / "out/a.safetensors").exists()


def test_outputs_that_cannot_be_made_are_refused_before_any_work(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: object) -> str:
        assert upsample(*arguments) == 2
        return capsys.readouterr().err

    assert "--out must be a folder; " in refused(photos, "--out", photos / "a.jpg")
    assert "--out must be a folder; " in refused(photos, "--out", photos / "a.jpg/deeper")
    assert "would be taken for images in the next run" in refused(photos, "--out", photos)
    assert "would replace the image" in refused(photos / "b.png", "--out", photos)
    (tmp_path / "empty").mkdir()
    assert "empty holds none" in refused(tmp_path / "empty")
    Image.new("RGB", (32, 32)).save(photos / "a.png")
    assert "every image needs an output of its own" in refused(photos)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "that can be written to" in refused(photos / "b.png")
    assert not loads


def test_pictures_of_an_earlier_run_are_not_upsampled(
    upsample: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert upsample(photos, "--out", photos / "features") == 0
    assert "0 written, 3 kept" in capsys.readouterr().out


def test_the_same_image_named_twice_is_worked_on_once(
    upsample: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample(photos / "a.jpg", photos / "a.jpg", photos) == 0
    assert "3 written" in capsys.readouterr().out
