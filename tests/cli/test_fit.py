"""``featup-hub fit``: it replaces no file of the user, and refuses wrong arguments at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featup_hub.upsamplers import ImplicitUpsampler
from featup_hub.weights import write
from tests.cli.conftest import Command

STAGES, OWN = "start.safetensors", "own.safetensors"


@pytest.fixture(autouse=True)
def folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of photographs, in which the command runs and does no work."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.chdir(photos)
    monkeypatch.setattr("featup_hub.pixels.read_image", work)
    for name in (STAGES, OWN):
        (photos / name).write_text("weights")
    return photos


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.png", "b.png would replace b.png, which is read; give another --out, or --no-picture"),
        ("a.jpg --out a.jpg --no-picture", "must be named *.safetensors; got a.jpg"),
        ("a.jpg --out o1.png", "must be named *.safetensors; got o1.png"),
        ("b.png --out ../photos/b.safetensors", "../photos/b.png would replace b.png"),
        (f"a.jpg --upsampler {STAGES} --out {STAGES}", f"{STAGES} would replace {STAGES}"),
        (f"a.jpg --model resnet18={OWN} --out {OWN}", f"{OWN} would replace {OWN}"),
        ("c.png --out new.safetensors", "new.png would replace c.png"),
        ("a.jpg --out d.safetensors", "d.png is a folder; name a file in it"),
    ],
)
def test_an_output_that_would_replace_an_input_is_refused_before_the_work(
    line: str, message: str, folder: Path, command: Command
) -> None:
    (folder / "new.png").write_text("an image of an odd name")
    (folder / "c.png").symlink_to(folder / "new.png")
    (folder / "d.png").mkdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = command("fit", line)
    assert done.code == 2
    assert message in done.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "line",
    ["a.jpg", "b.png --no-picture", "b.png --out c.safetensors", f"a.jpg --upsampler {STAGES}"],
)
def test_an_output_of_its_own_is_not_refused(line: str, command: Command) -> None:
    with pytest.raises(AssertionError, match="the work began"):
        command("fit", line)


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg --no-picture"])
@pytest.mark.parametrize("kind", ["weights", "damaged"])
def test_a_file_of_another_kind_is_not_replaced(
    line: str, kind: str, folder: Path, command: Command
) -> None:
    out = folder / "a.safetensors"
    write({"weight": torch.zeros(3)}, out)
    if kind == "damaged":
        out.write_bytes(out.read_bytes()[:9])
    before = out.read_bytes()
    assert command("fit", line) == (
        1,
        "",
        "error: a.safetensors exists, and is not of an earlier fit; --overwrite replaces it, "
        "another --out keeps both\n",
    )
    assert out.read_bytes() == before
    with pytest.raises(AssertionError, match="the work began"):
        command("fit --overwrite", line)


def test_a_picture_of_somebody_else_s_is_not_replaced(folder: Path, command: Command) -> None:
    picture, others = folder / "a.png", (folder / "b.png").read_bytes()
    picture.write_bytes(others)
    assert command("fit a.jpg") == (
        1,
        "",
        "error: a.png exists without features, so it is not of an earlier fit; "
        "--overwrite replaces it, another --out keeps both, --no-picture does without\n",
    )
    assert picture.read_bytes() == others
    for way in ("--overwrite", "--no-picture"):
        with pytest.raises(AssertionError, match="the work began"):
            command("fit a.jpg", way)


def test_what_an_earlier_fit_made_is_made_anew_without_being_asked(
    folder: Path, command: Command
) -> None:
    module = ImplicitUpsampler(torch.rand(1, 3, 8, 8), torch.zeros(3), torch.eye(3), frequencies=2)
    module.save(folder / "a.safetensors")
    for picture in (False, True):  # an interruption may come between the two
        if picture:
            (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
        with pytest.raises(AssertionError, match="the work began"):
            command("fit a.jpg")
