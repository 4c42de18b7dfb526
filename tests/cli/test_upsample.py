"""``featup-hub upsample``: features and pictures of images, and one-line errors."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from featup_hub import JBUStack, __version__, load
from featup_hub.cli import main
from featup_hub.cli.arguments import add_model, choose_model
from featup_hub.image import preprocess, read_image
from featup_hub.weights import read, write
from tests.cli.conftest import Colours


def test_one_image_makes_features_and_a_picture(
    upsample: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample(photos / "a.jpg") == 0
    with safe_open(tmp_path / "out/a.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["features"]
        features = file.get_tensor("features")
        notes = file.metadata()
    assert features.shape == (3, 32, 48)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert notes["model"] == "efficientnet_lite0"
    assert notes["size"] == "32"
    assert notes["image"] == "a.jpg"
    assert notes["featup_hub"] == __version__
    usual = (photos / "a.jpg").stat().st_mode
    assert (tmp_path / "out/a.safetensors").stat().st_mode == usual
    with Image.open(tmp_path / "out/a.png") as picture:
        assert picture.mode == "RGB"
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out/a.safetensors'} and a.png: 3 x 32 x 48 in" in out
    assert len(out.splitlines()) == 1


def test_a_folder_keeps_its_structure_and_the_model_is_loaded_once(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    loads: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert upsample(photos, "--no-picture") == 0
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert made == ["a.safetensors", "b.safetensors", "more/c.safetensors"]
    assert loads == ["efficientnet_lite0"]
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines[:3]] == ["[1/3]", "[2/3]", "[3/3]"]
    assert lines[3].startswith("3 written, 0 kept, 0 failed in ")


def test_bad_images_are_reported_and_the_others_go_on(
    upsample: Any, photos: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "page.jpg").write_text("<html>")
    whole = (root / "tests/data/chelsea.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert upsample(photos, photos / "missing.jpg") == 1
    out, err = capsys.readouterr()
    errors = err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)
    assert f"no such file: {photos / 'missing.jpg'}" in err
    assert "cut.jpg is damaged or cut short" in err
    assert "page.jpg is not an image" in err
    assert "3 written, 0 kept, 3 failed" in out
    names = {p.name for p in (tmp_path / "out").rglob("*.*")}
    assert names == {"a.safetensors", "a.png", "b.safetensors", "b.png", "c.safetensors", "c.png"}


def test_a_single_image_that_fails_needs_no_summary(
    upsample: Any, photos: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample(photos / "nothing.jpg") == 1
    assert capsys.readouterr() == ("", f"error: no such file: {photos / 'nothing.jpg'}\n")
    assert not loads


def test_a_failure_names_its_image_and_what_to_do_about_memory(
    upsample: Any,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(Colours, "features", full)
    assert upsample(photos / "a.jpg") == 1
    err = capsys.readouterr().err
    assert f"{photos / 'a.jpg'}: not enough memory; try a smaller --size" in err
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        upsample(photos / "a.jpg", "--debug")


def test_features_are_those_of_the_model(root: Path, stages: Path, tmp_path: Path) -> None:
    photo = root / "tests/data/chelsea.jpg"
    flags = ["--weights", stages, "--out", tmp_path, "--size", "64x96", "--no-picture"]
    flags += ["--format", "npy", "--impl", "reference"]
    assert main(["upsample", *map(str, [photo, *flags])]) == 0
    model = load("efficientnet_lite0", weights=stages)
    image = preprocess(read_image(photo), (64, 96), mean=model.mean, std=model.std)
    with torch.inference_mode():
        expected = model(image, impl="reference")[0]
    found = torch.from_numpy(np.load(tmp_path / "chelsea.npy"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["chelsea.npy"]


def test_errors_of_loading_advise_flags(
    photos: Path,
    stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*flags: object) -> str:
        line = ["upsample", photos / "a.jpg", "--out", tmp_path / "out", *flags]
        assert main([str(word) for word in line]) == 1
        return capsys.readouterr().err

    norm = {"norm.weight": torch.ones(112), "norm.bias": torch.zeros(112)}
    write(JBUStack(112).state_dict(), tmp_path / "bare.safetensors")
    write({**JBUStack(112).state_dict(), **norm}, tmp_path / "normed.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    assert "give --no-norm" in refused("--weights", tmp_path / "bare.safetensors")
    assert "leave --no-norm out" in refused(
        "--weights", tmp_path / "normed.safetensors", "--no-norm"
    )
    assert "by --model NAME=FILE" in refused("--upsampler", stages, "--model", "vit")


def test_a_size_the_network_cannot_take_is_refused_once_its_stride_is_known(
    upsample: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample(photos, "--model", "timm/resnet18", "--size", "40") == 2
    err = capsys.readouterr().err
    assert err == (
        "error: --size must be a positive multiple of 16; got 40; try 32 or 48; "
        "16 is the stride of timm/resnet18\n"
    )


def test_without_a_size_the_stride_s_multiple_nearest_to_the_card_s_is_taken(
    stages: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # LeViT's images have 224 pixels a side, and its deepest features a stride of 64.
    own = tmp_path / "own.pth"
    torch.save(timm.create_model("levit_128s").state_dict(), own)
    model = ["--model", f"levit_128s={own}", "--upsampler", str(stages)]
    line = ["upsample", str(photos / "a.jpg"), *model, "--out", str(tmp_path / "out")]
    assert main(line) == 0, capsys.readouterr().err
    with safe_open(tmp_path / "out/a.safetensors", framework="pt") as file:
        assert file.get_tensor("features").shape == (384, 256, 320)
        assert file.metadata()["size"] == "256"
    assert main(line) == 0
    assert "kept" in capsys.readouterr().out


def test_half_precision_halves_the_file_and_refuses_what_it_cannot_hold(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (photos / "a.jpg", "--no-picture", "--dtype", "float16")
    assert upsample(*flags) == 0
    assert read(tmp_path / "out/a.safetensors")["features"].dtype == torch.float16
    assert upsample(photos / "a.jpg", "--no-picture") == 1
    assert "made with dtype float16, not float32" in capsys.readouterr().err
    monkeypatch.setattr(Colours, "features", lambda _, image: 1e6 * F.avg_pool2d(image, 16))
    assert upsample(*flags, "--overwrite") == 1
    assert "float16 holds values up to 65504; features reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--weights", "jbu_sharp"], ["--upsampler", "jbu_faithful"]),
        (["--backbone-weights", "own"], ["--model", "efficientnet_lite0=own"]),
    ],
)
def test_old_spellings_name_the_same_model(
    old: list[str], new: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write({"x": torch.zeros(1)}, "own")
    parser = argparse.ArgumentParser()
    add_model(parser)
    assert choose_model(parser.parse_args(old)) == choose_model(parser.parse_args(new))


def test_pixels_of_12_bits_are_warned_of_in_a_line_and_a_range_keeps_their_levels(
    upsample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert upsample(tmp_path / "deep.png") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "--value-range LOW HIGH" in line
    flags = (tmp_path / "deep.png", "--value-range", 0, 4095, "--bands", "1,1,1")
    assert upsample(*flags, "--overwrite") == 0
    assert upsample(tmp_path / "deep.png") == 1
    assert "made with bands 1,1,1, not all" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["é" * 115 + ".jpg", os.fsdecode(b"caf\xe9.jpg")])
def test_long_names_and_names_in_another_encoding_are_worked_on(
    upsample: Any, photos: Path, tmp_path: Path, name: str
) -> None:
    (photos / "a.jpg").rename(tmp_path / name)
    for form in ("safetensors", "npy"):
        assert upsample(tmp_path / name, "--format", form) == 0
        assert (tmp_path / "out" / name).with_suffix(f".{form}").exists()


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_full_disk_is_named_with_the_file_and_nothing_is_left_half_written(
    form: str, upsample: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))  # bytes a file may have
    try:
        assert upsample(photos / "a.jpg", "--format", form) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert f"out/a.{form}: File too large" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_on_a_terminal_progress_is_one_line(
    upsample: Any,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (photos / "c.jpg").write_text("no image")
    assert upsample(photos) == 1
    out, err = capsys.readouterr()
    assert out.startswith("3 written, 0 kept, 1 failed in ")
    assert f"{photos / 'b.png'}:" in err
    assert f"\rerror: an image file is needed; {photos / 'c.jpg'}" in err
    assert err.count("\n") == 1


def test_links_to_folders_are_followed(
    upsample: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(photos)
    assert upsample(tmp_path / "data", "--no-picture") == 0
    assert "3 written" in capsys.readouterr().out
    assert (tmp_path / "out/linked/more/c.safetensors").exists()
