"""Shared by tests of the command line: a tiny model, photographs, a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from featup_hub import UpsampledBackbone, load_upsampler
from featup_hub.cli import main
from featup_hub.registry import ModelCard
from tests.evaluation.conftest import MeanColour


class Result(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line."""

    def run(*words: object) -> Result:
        code = main([part for word in words for part in str(word).split()])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces models by a tiny one; lists the loads."""
    names: list[str] = []

    def load_tiny(card: ModelCard, *, upsampler: Path, **_: object) -> UpsampledBackbone:
        names.append(card.name)
        return UpsampledBackbone(MeanColour(), load_upsampler(upsampler)).eval()

    monkeypatch.setattr("featup_hub.loading.load", load_tiny)
    return names


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of photographs, the folder ``photos`` in the current one."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(["a.jpg", "b.png", "more/c.jpg"]):
        Image.new("RGB", (40, 32 + index), (200, 10, 90)).save(folder / name)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def upsample(loads: list[str], stages: Path, photos: Path, command: Command) -> Command:
    """Runs the command with the tiny model; outputs are in ``out``."""

    def run(*words: object) -> Result:
        return command("upsample --upsampler", stages, "--out out --size 32", *words)

    return run
