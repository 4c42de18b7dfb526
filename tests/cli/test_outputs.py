"""Outputs of ``upsample``: kept, made, or refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from featup_hub import JBUStack
from featup_hub.weights import write


def test_a_second_run_keeps_what_is_finished_and_makes_what_is_missing(upsample, loads):
    upsample("photos photos/a.jpg")
    first = Path("out/a.safetensors").stat().st_mtime_ns
    Path("out/b.png").unlink()
    done = upsample("photos")
    assert done.code == 0
    assert "kept 2 finished outputs; --overwrite replaces" in done.out
    assert "1 written, 2 kept, 0 failed" in done.out
    assert Path("out/a.safetensors").stat().st_mtime_ns == first
    assert Path("out/b.png").exists()
    assert upsample("photos").code == 0
    assert len(loads) == 2  # nothing to do: no model
    assert upsample("photos --overwrite").code == 0
    assert Path("out/a.safetensors").stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--size 48", "made with size 32, not 48"),
        ("--model vit", "made with model efficientnet_lite0, not vit"),
        ("--upsampler other.safetensors", "made with upsampler"),
        ("", "is not a safetensors file; --overwrite replaces it"),
    ],
)
def test_outputs_of_other_settings_are_neither_kept_nor_replaced(upsample, changed, message):
    upsample("photos/a.jpg")
    torch.manual_seed(99)  # other weights than those of the stages
    write(JBUStack().state_dict(), "other.safetensors")
    made = Path("out/a.safetensors")
    if not changed:
        made.write_text("something else")
    before = made.read_bytes()
    done = upsample("photos/a.jpg", changed)
    assert done.code == 1
    assert message in done.err
    assert made.read_bytes() == before
    assert upsample("photos/a.jpg --overwrite", changed).code == 0


def test_outputs_of_another_photograph_of_the_same_name_are_not_kept(upsample):
    upsample("photos/a.jpg")
    Image.new("RGB", (48, 32), "red").save("a.jpg")
    done = upsample("a.jpg")
    assert done.code == 1
    assert "out/a.safetensors exists, made of another a.jpg; --overwrite replaces it" in done.err


def test_an_interruption_keeps_what_is_finished_and_leaves_nothing_half_written(
    upsample, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    upsample("photos/a.jpg")
    monkeypatch.setattr("featup_hub.weights.files.write", interrupt)
    done = upsample("photos")
    assert done.code == 130
    assert "error: interrupted; what is finished is kept" in done.err
    assert {path.name for path in Path("out").iterdir()} == {"a.safetensors", "a.png"}


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_picture_of_somebody_else_s_is_not_replaced(form, upsample):
    picture, others = Path("a.png"), Path("photos/b.png").read_bytes()
    picture.write_bytes(others)
    line = f"photos/a.jpg --out . --format {form}"
    done = upsample(line)
    assert done.code == 1
    assert "a.png exists without features" in done.err
    assert "--overwrite replaces it, another --out keeps both" in done.err
    assert picture.read_bytes() == others
    assert not picture.with_suffix(f".{form}").exists()
    assert upsample(line, "--no-picture").code == 0
    assert upsample(line, "--overwrite").code == 0
    assert picture.read_bytes() != others


def test_a_picture_of_features_in_the_other_format_is_made_anew(upsample):
    assert upsample("photos/a.jpg --format npy").code == 0
    assert upsample("photos/a.jpg").code == 0
    assert Path("out/a.safetensors").exists()


def test_outputs_that_cannot_be_made_are_refused_before_any_work(upsample, tmp_path, loads):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twins").mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / "twins" / name)
    for line, message in (
        ("photos --out photos/a.jpg", "--out must be a folder that takes new files; "),
        ("photos --out photos/a.jpg/deeper", "--out must be a folder that takes new files; "),
        ("photos --out photos", "would be taken for images in the next run"),
        ("photos/b.png --out photos", "would replace the image"),
        ("empty", "empty holds none"),
        ("twins", "every image needs an output of its own"),
        ("photos --out /proc", "--out must be a folder that takes new files; /proc: "),
    ):
        done = upsample(line)
        assert done.code == 2
        assert message in done.err
    assert not loads
    assert not Path("out").exists()


def test_pictures_of_an_earlier_run_are_not_upsampled(upsample):
    upsample("photos --out photos/features")
    assert "0 written, 3 kept" in upsample("photos --out photos/features").out
