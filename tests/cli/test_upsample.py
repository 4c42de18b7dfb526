"""``featup-hub upsample``: features and pictures of images, and one-line errors."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from featup_hub import JBUStack, __version__, load
from featup_hub.image import preprocess, read_image
from featup_hub.weights import metadata, read, write
from tests.conftest import full_disk
from tests.evaluation.conftest import MeanColour

FEATURES = Path("out/a.safetensors")


def test_one_image_makes_features_and_a_picture(upsample):
    done = upsample("photos/a.jpg")
    assert done.code == 0
    assert done.out.startswith("wrote out/a.safetensors and a.png: 3 x 32 x 48 in")
    assert len(done.out.splitlines()) == 1
    (features,) = read(FEATURES).values()
    assert features.shape == (3, 32, 48)
    assert features.dtype == torch.float32
    notes = metadata(FEATURES)
    assert (notes["model"], notes["size"]) == ("efficientnet_lite0", "32")
    assert (notes["image"], notes["featup_hub"]) == ("a.jpg", __version__)
    assert FEATURES.stat().st_mode == Path("photos/a.jpg").stat().st_mode
    with Image.open("out/a.png") as picture:
        assert picture.mode == "RGB"


def test_features_are_those_of_the_model(command, root, stages, tmp_path):
    photo = root / "tests/data/chelsea.jpg"
    flags = "--size 64x96 --no-picture --format npy --impl reference"
    assert command("upsample", photo, "--upsampler", stages, "--out", tmp_path, flags).code == 0
    model = load("efficientnet_lite0", upsampler=stages)
    image = preprocess(read_image(photo), (64, 96), mean=model.mean, std=model.std)
    with torch.inference_mode():
        expected = model(image, impl="reference")[0]
    found = torch.from_numpy(np.load(tmp_path / "chelsea.npy"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["chelsea.npy"]


def test_a_folder_keeps_its_structure_and_the_model_is_loaded_once(
    upsample, photos, tmp_path, loads
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(photos)
    done = upsample("data --no-picture")
    assert done.code == 0
    made = sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*.*"))
    assert made == [f"linked/{name}.safetensors" for name in ("a", "b", "more/c")]
    assert loads == ["efficientnet_lite0"]
    lines = done.out.splitlines()
    assert [line[:5] for line in lines[:3]] == ["[1/3]", "[2/3]", "[3/3]"]
    assert lines[3].startswith("3 written, 0 kept, 0 failed in ")


def test_bad_images_are_reported_and_the_others_go_on(upsample, photos, root):
    (photos / "page.jpg").write_text("<html>")
    whole = (root / "tests/data/chelsea.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    done = upsample("photos photos/missing.jpg")
    assert done.code == 1
    errors = done.err.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    for error, part in zip(
        errors,
        ("no such file: photos/missing.jpg", "cut.jpg is damaged", "page.jpg is not an image"),
        strict=True,
    ):
        assert part in error
    assert "3 written, 0 kept, 3 failed" in done.out
    made = {path.name for path in Path("out").rglob("*.*")}
    assert made == {f"{name}.{suffix}" for name in "abc" for suffix in ("safetensors", "png")}


def test_a_single_image_that_is_missing_needs_no_summary_no_model_and_no_folder(upsample, loads):
    assert upsample("photos/nothing.jpg") == (1, "", "error: no such file: photos/nothing.jpg\n")
    assert not loads
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you ..."), "not enough memory"),
        (MemoryError(), "not enough memory; try a smaller --size"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_failure_names_its_image_and_what_to_do_about_memory(
    upsample, monkeypatch, error, message
):
    def fail(*_):
        raise error

    monkeypatch.setattr(MeanColour, "features", fail)
    done = upsample("photos/a.jpg")
    assert done.code == 1
    assert f"photos/a.jpg: {message}" in done.err
    with pytest.raises(type(error)):
        upsample("photos/a.jpg --debug")


def test_errors_of_loading_advise_flags(command, photos, stages, monkeypatch):
    norm = {"norm.weight": torch.ones(112), "norm.bias": torch.zeros(112)}
    write(JBUStack(112).state_dict(), "bare.safetensors")
    write({**JBUStack(112).state_dict(), **norm}, "normed.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    for flags, advice in (
        ("--upsampler bare.safetensors", "give --no-norm"),
        ("--upsampler normed.safetensors --no-norm", "leave --no-norm out"),
        (f"--upsampler {stages} --model vit", "by --model NAME=FILE"),
    ):
        done = command("upsample photos/a.jpg --out out", flags)
        assert done.code == 1
        assert advice in done.err


@pytest.mark.parametrize(
    ("flags", "multiple", "near"),
    [
        ("--model timm/resnet18", 32, "32 or 64"),
        ("--layer 1", 4, "40 or 44"),
        ("--looks 4", 8, "40 or 48"),
    ],
)
def test_a_size_the_network_cannot_take_is_refused_before_weights_are_loaded(
    upsample, loads, flags, multiple, near
):
    code, _, error = upsample(f"photos --size 42 {flags}")
    assert code == 2
    assert f"size must be a positive multiple of {multiple}; got 42; try {near}" in error
    assert loads == []


def test_without_a_size_the_stride_s_multiple_nearest_to_the_card_s_is_taken(
    command, stages, photos
):
    # LeViT's images have 224 pixels a side, and its deepest features a stride of 64.
    torch.save(timm.create_model("levit_128s").state_dict(), "own.pth")
    flags = f"--model levit_128s=own.pth --upsampler {stages} --out out --no-picture"
    line = f"upsample photos/a.jpg {flags}"
    assert command(line).code == 0
    assert read(FEATURES)["features"].shape == (384, 256, 320)
    assert metadata(FEATURES)["size"] == "256"
    assert "kept" in command(line).out


def test_half_precision_halves_the_file_and_refuses_what_it_cannot_hold(upsample, monkeypatch):
    assert upsample("photos/a.jpg --no-picture --dtype float16").code == 0
    assert read(FEATURES)["features"].dtype == torch.float16
    other = upsample("photos/a.jpg --no-picture")
    assert other.code == 1
    assert "made with dtype float16, not float32" in other.err
    monkeypatch.setattr(MeanColour, "features", lambda _, image: 1e6 * F.avg_pool2d(image, 16))
    large = upsample("photos/a.jpg --no-picture --dtype float16 --overwrite")
    assert large.code == 1
    assert "float16 holds values up to 65504; features reach" in large.err


def test_pixels_of_12_bits_are_warned_of_in_a_line_and_a_range_keeps_their_levels(upsample):
    ramp = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save("deep.png")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = upsample("deep.png")
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.startswith("warning: ")
    assert "--value-range LOW HIGH" in line
    assert upsample("deep.png --value-range 0 4095 --bands 1,1,1 --overwrite").code == 0
    assert "made with bands 1,1,1, not all" in upsample("deep.png").err


@pytest.mark.parametrize("form", ["safetensors", "npy"])
@pytest.mark.parametrize("name", ["é" * 115 + ".jpg", os.fsdecode(b"caf\xe9.jpg")])
def test_long_names_and_names_in_another_encoding_are_worked_on(upsample, photos, name, form):
    (photos / "a.jpg").rename(name)
    assert upsample(name, "--format", form).code == 0
    assert Path("out", name).with_suffix(f".{form}").exists()


def test_a_full_disk_is_named_with_the_file_and_nothing_is_left_half_written(upsample):
    with full_disk(5000):
        done = upsample("photos/a.jpg")
    assert done.code == 1
    assert "out/a.safetensors: File too large" in done.err
    assert not list(Path("out").iterdir())


def test_on_a_terminal_progress_is_one_line(upsample, photos, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (photos / "c.jpg").write_text("no image")
    done = upsample("photos")
    assert done.code == 1
    assert done.out.startswith("3 written, 0 kept, 1 failed in ")
    assert "photos/b.png:" in done.err
    assert "\rerror: an image file is needed; photos/c.jpg" in done.err
    assert done.err.count("\n") == 1
