"""Shared by all tests: the folder of research data, and the rule for a missing GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from featup_hub import JBUStack
from featup_hub.weights import write
from tests.local_hub import LocalHub, serving

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measures no coverage in slow tests: it made tracing and compiling take two thirds longer.

    Their files come first: pytest-xdist hands files out in this order, and a long one at the end
    would leave the other process without work.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        item.add_marker("no_cover")
    first = {item.path for item in slow}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The research data beside the checkout; tests that need it are listed as skipped without."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no research data: ../shared/data is missing")
    return folder


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """A CUDA device; FEATUP_HUB_REQUIRE_CUDA=1 turns a missing one into a failure."""
    if not torch.cuda.is_available():
        if os.environ.get("FEATUP_HUB_REQUIRE_CUDA") == "1":
            pytest.fail("FEATUP_HUB_REQUIRE_CUDA=1, but torch finds no CUDA device")
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random stages."""
    path = tmp_path_factory.mktemp("weights") / "stages.safetensors"
    torch.manual_seed(3)
    write(JBUStack().state_dict(), path)
    return path


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Lets no file grow beyond ``room`` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for files of the Hugging Face Hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hugging Face Hub on this machine, which the Hub's library talks to."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 3)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running
