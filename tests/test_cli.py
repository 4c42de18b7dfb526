"""The command line: what is written, what is said, and what the exit code is."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from featup_hub import Backbone, JBUStack, UpsampledBackbone, __version__, load, load_upsampler
from featup_hub.cli import main
from featup_hub.cli.flags import add_flags, from_flags
from featup_hub.cli.terminal import Progress, UsageError, duration, explain
from featup_hub.image import preprocess, read_image
from featup_hub.weights import read, write


class Colours(Backbone):
    """The image's mean colours, as features of 16-pixel patches."""

    def __init__(self) -> None:
        super().__init__(feat_dim=3, patch_size=16)

    def features(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 16)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces models by a tiny one; lists the loads."""
    names: list[str] = []

    def load_tiny(name: str, *, weights: Path, **_: object) -> UpsampledBackbone:
        names.append(name)
        return tiny(weights)

    monkeypatch.setattr("featup_hub.cli.upsample.load", load_tiny)
    return names


def tiny(weights: Path) -> UpsampledBackbone:
    return UpsampledBackbone(Colours(), load_upsampler(weights=weights)).eval()


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "stages.safetensors"
    write(JBUStack().state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(["a.jpg", "b.png", "more/c.jpg"]):
        Image.new("RGB", (40, 32 + index), (200, 10, 90)).save(folder / name)
    return folder


@pytest.fixture
def upsample(loads: list[str], stages: Path, tmp_path: Path) -> Any:
    """Runs the command on arguments, into tmp_path/out."""

    def run(*arguments: object) -> int:
        flags = ["--weights", stages, "--out", tmp_path / "out", "--size", 32]
        return main(["upsample", *map(str, [*flags, *arguments])])

    return run


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


def test_features_are_those_of_the_model(
    upsample: Any, photos: Path, tmp_path: Path, stages: Path
) -> None:
    upsample(photos / "a.jpg", "--format", "npy", "--impl", "reference", "--no-picture")
    found = np.load(tmp_path / "out/a.npy")
    pixels = np.asarray(Image.open(photos / "a.jpg").resize((48, 32), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(v)[:, None, None] for v in (Colours.mean, Colours.std))
    image = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]
    model = tiny(stages)
    with torch.inference_mode():
        expected = model.upsampler(model.source(image), image, impl="reference")
    assert np.allclose(found, expected[0], atol=1e-5)
    assert not (tmp_path / "out/a.png").exists()


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
    assert "kept 2 finished outputs; --overwrite makes anew" in out
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
        (["--size", "48"], "made with size 32 in place of 48"),
        (["--model", "vit"], "made with model efficientnet_lite0 in place of vit"),
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
    write(JBUStack().state_dict(), tmp_path / "other.safetensors")
    assert upsample(photos / "a.jpg", "--weights", tmp_path / "other.safetensors") == 1
    assert "made with upsampler" in capsys.readouterr().err
    (tmp_path / "out/a.safetensors").write_text("something else")
    assert upsample(photos / "a.jpg") == 1
    assert "is not a safetensors file; --overwrite replaces it" in capsys.readouterr().err


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


def test_an_interruption_keeps_what_is_finished_and_leaves_nothing_half_written(
    upsample: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def save(tensors: object, path: Path, metadata: object) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    upsample(photos / "a.jpg")
    monkeypatch.setattr("safetensors.torch.save_file", save)
    assert upsample(photos) == 130
    assert "error: interrupted; what is finished is kept" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.safetensors", "a.png", "b.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upsample", "x", "--model", "dinov"], "did you mean 'dinov2'"),
        (["upsample", "x", "--model", "jbu"], "a model with a backbone is needed; jbu"),
        (["upsample", "x", "--size", "225"], "--size must be a positive multiple of 16; got 225"),
        (["upsample", "x", "--size", "224x100"], "got 100; try 96 or 112; 16 is the stride"),
        (["upsample", "x", "--size", "0"], "got 0; try 16 or 32"),
        (["upsample", "x", "--size", "big"], "such as 448, or HxW, 448x640; got 'big'"),
        (["upsample", "x", "--device", "gpu"], "--device must be cpu, cuda, cuda:1 or mps"),
        (["upsample", "x", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["upsample", "x", "--weights", "nothing"], "no weights file nothing; check the name"),
        (["upsample", "x", "--over"], "unrecognized arguments: --over"),
        (["upsample"], "required: IMAGE; see featup-hub upsample --help"),
        (["upsampel"], "invalid choice: 'upsampel' (choose from"),
        (["train", "photos"], "required: --out; see featup-hub train --help"),
        (["train", "photos", "--out", "x", "--steps", "ten"], "invalid int value: 'ten'"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err.splitlines()[0]
    assert "Traceback" not in err
    with pytest.raises(UsageError):
        main([*arguments, "--debug"])


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


def test_the_shipped_backbone_s_features_are_written(
    root: Path, stages: Path, tmp_path: Path
) -> None:
    photo = root / "tests/data/chelsea.jpg"
    flags = ["--weights", stages, "--out", tmp_path, "--size", "64x96"]
    assert main(["upsample", *map(str, [photo, *flags])]) == 0
    model = load("efficientnet_lite0", weights=stages)
    image = preprocess(read_image(photo), (64, 96), mean=model.mean, std=model.std)
    with torch.inference_mode():
        expected = model(image)[0]
    found = read(tmp_path / "chelsea.safetensors")["features"]
    assert torch.allclose(found, expected, atol=1e-5)


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
    assert "give its path as --backbone-weights" in refused("--weights", stages, "--model", "vit")


def test_a_size_the_network_cannot_take_is_refused_once_its_stride_is_known(
    upsample: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample(photos, "--model", "timm/resnet18", "--size", "40") == 2
    err = capsys.readouterr().err
    assert err == (
        "error: --size must be a positive multiple of 16; got 40; try 32 or 48; "
        "16 is the stride of timm/resnet18\n"
    )


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


def test_models_are_listed_with_where_their_weights_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jbu_universal.safetensors").touch()
    monkeypatch.setattr("featup_hub.weights.shipped_folder", lambda: tmp_path)
    cached: dict[str, str] = {"timm/vit_small_patch16_224.dino": "/cache/file"}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo_id, *_, **__: cached.get(repo_id)
    )
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "channels", "stride", "weights", "licence", "backbone"]
    row = next(line.split() for line in lines if line.startswith("dinov2 "))
    assert row == ["dinov2", "384", "14", "Hub", "Apache-2.0", "vit_small_patch14_dinov2.lvd142m"]
    assert "Hub: downloaded from the Hugging Face Hub at first use" in lines
    notes = [line for line in lines if line.startswith("dinov3_vits16, dinov3_vitb16: ")]
    assert "The DINOv3 License" in notes[0]
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dino16"]["weights"] == "cached"
    assert rows["jbu"]["weights"] == "shipped"
    assert rows["jbu"]["channels"] is None
    assert rows["efficientnet_lite0"]["weights"] == "missing"
    assert rows["efficientnet_lite0"]["licence"] == "Apache-2.0"


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
    assert "no checkpoint file missing.ckpt" in capsys.readouterr().err
    assert main(["convert", "in.ckpt", "in.ckpt"]) == 2
    assert "must be named *.safetensors; got in.ckpt" in capsys.readouterr().err


def test_train_makes_a_file_that_upsample_takes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = "--steps 1 --batch 1 --image-size 32 --views 1 --crf-samples 10 --projection-dim 4"
    line = ["train", str(photos), "--out", str(tmp_path / "run"), *size.split()]
    assert main([*line, "--model", "efficientnet_lite0"]) == 0
    made = tmp_path / "run/jbu.safetensors"
    assert f"wrote {made}" in capsys.readouterr().out
    flags = ["--weights", made, "--out", tmp_path / "out", "--size", 32]
    assert main([str(word) for word in ["upsample", photos / "a.jpg", *flags]]) == 0
    assert main([*line, "--lr", "1"]) == 1
    assert "another config" in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in ("models", "upsample", "train", "convert"))


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"featup_hub {__version__}\n"


def test_python_m_runs_the_command_line_and_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m featup_hub models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name ")
    assert done.stderr == ""
    assert done.returncode == 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        steps: How many
            steps, at 100 %.
        rate: See :func:`steps` and ``this``.
        mode: A choice.
        size: Height and width.
        names: Any number.
        fast: Whether.
        out: Where to.
        limit: At most.
    """

    steps: int = 5
    rate: float = 1e-3
    mode: Literal["a", "b"] = "a"
    size: tuple[int, int] = (2, 3)
    names: tuple[str, ...] = ()
    fast: bool = True
    out: Path
    limit: float | None = None


def parser_of_run() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_flags(parser, Run, aliases={"names": "--model"})
    return parser


def test_flags_set_fields_of_every_kind() -> None:
    line = "--steps 7 --rate .5 --mode b --size 4 6 --model x y --no-fast --out o --limit 2"
    run = from_flags(Run, parser_of_run().parse_args(line.split()))
    assert run == Run(
        steps=7,
        rate=0.5,
        mode="b",
        size=(4, 6),
        names=("x", "y"),
        fast=False,
        out=Path("o"),
        limit=2.0,
    )
    assert from_flags(Run, parser_of_run().parse_args(["--out", "o"])) == Run(out=Path("o"))


@pytest.mark.parametrize(
    "line", ["--steps 1.5 --out o", "--mode c --out o", "--size 1 --out o", "--steps 3"]
)
def test_flags_refuse_what_fields_cannot_hold(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser_of_run().parse_args(line.split())


def test_flags_take_their_help_from_the_docstring() -> None:
    text = " ".join(parser_of_run().format_help().split())
    assert "How many steps, at 100 % (default: 5)" in text
    assert "See steps and this (default: 0.001)" in text
    assert "Height and width (default: 2 3)" in text
    assert "Whether (default: on)" in text
    assert "At most -" not in text
    assert "None" not in text


def test_a_field_no_flag_can_express_is_a_programming_error() -> None:
    @dataclass
    class Odd:
        table: dict[str, int]

    with pytest.raises(TypeError, match=r"a flag is int.*table is dict"):
        add_flags(argparse.ArgumentParser(), Odd)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    progress = Progress(3, stream=terminal)
    for name in ("a.jpg", "x" * 80):
        progress.begin(name)
        progress.end("wrote it")
    progress.begin("c.jpg")
    progress.fail("c.jpg is broken")
    progress.finish("in out")
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert drawn[1] == "[1/3] a.jpg"
    assert drawn[2].endswith("…")
    assert max(map(len, drawn)) <= 39
    assert "c.jpg, about 0 s left" in drawn[3]
    assert "\n" not in terminal.getvalue()
    out, err = capsys.readouterr()
    assert out.startswith("2 written, 0 kept, 1 failed in out")
    assert err == "error: c.jpg is broken\n"


def test_exceptions_are_explained_in_a_line() -> None:
    assert explain(OSError(28, "No space left on device", "x.npy")) == (
        "x.npy: No space left on device"
    )
    assert explain(MemoryError()).startswith("not enough memory; try a smaller --size")
    assert explain(ValueError()) == "ValueError"
    assert duration(100) == "2 min"
