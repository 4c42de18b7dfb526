"""``featup-hub fit``: it replaces no file of the user, and refuses wrong arguments at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    line, message, folder, command
):
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
def test_an_output_of_its_own_is_not_refused(line, command):
    with pytest.raises(AssertionError, match="the work began"):
        command("fit", line)


@pytest.mark.parametrize("name", ["a.safetensors", "a.png"])
def test_an_output_that_exists_is_replaced_only_when_asked(name, folder, command):
    (folder / name).write_text("somebody's")
    done = command("fit a.jpg")
    assert done.code == 2
    assert f"{name} exists; give --overwrite to replace it, or another --out" in done.err
    assert (folder / name).read_text() == "somebody's"
    with pytest.raises(AssertionError, match="the work began"):
        command("fit a.jpg --overwrite")
