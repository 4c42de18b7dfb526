"""The cubin cache: files are reused, remade when damaged, never partial, optional."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from featup_hub.ops.cuda import cache

NAME = cache.cubin_name("jbu", 90, "source", ("-O3",), (13, 0))
IMAGE = b"\x7fELF" + bytes(range(256))


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    cache._warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> bytes:
    raise AssertionError("the compiler was called although the cubin is cached")


def test_a_second_fetch_reads_what_the_first_one_wrote(folder: Path) -> None:
    first = cache.fetch(NAME, lambda: IMAGE)
    second = cache.fetch(NAME, never)
    assert (first.hit, second.hit) == (False, True)
    assert first.image == second.image == IMAGE
    assert first.path == second.path == folder / NAME


def test_nothing_but_the_cubin_is_left_behind(folder: Path) -> None:
    cache.fetch(NAME, lambda: IMAGE)
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize(
    "other",
    [
        cache.cubin_name("jbu", 80, "source", ("-O3",), (13, 0)),
        cache.cubin_name("jbu", 90, "source ", ("-O3",), (13, 0)),
        cache.cubin_name("jbu", 90, "source", ("-O2",), (13, 0)),
        cache.cubin_name("jbu", 90, "source", ("-O3",), (13, 1)),
    ],
    ids=["architecture", "source", "options", "compiler"],
)
def test_whatever_decides_the_code_decides_its_name(other: str) -> None:
    assert other != NAME


@pytest.mark.parametrize("byte", [0, 100, len(IMAGE) - 1, len(IMAGE), len(IMAGE) + 31])
def test_one_flipped_bit_is_noticed_and_the_cubin_made_anew(folder: Path, byte: int) -> None:
    path = cache.fetch(NAME, lambda: IMAGE).path
    assert path is not None
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    again = cache.fetch(NAME, lambda: IMAGE)
    assert not again.hit
    assert again.image == IMAGE
    assert cache.fetch(NAME, never).hit


@pytest.mark.parametrize("length", [0, 1, 32, len(IMAGE)])
def test_a_truncated_file_is_noticed(folder: Path, length: int) -> None:
    path = cache.fetch(NAME, lambda: IMAGE).path
    assert path is not None
    path.write_bytes(path.read_bytes()[:length])
    assert not cache.fetch(NAME, lambda: IMAGE).hit


def test_a_damaged_file_is_gone_even_if_the_compiler_then_fails(folder: Path) -> None:
    folder.mkdir()
    (folder / NAME).write_bytes(b"not a cubin")

    def fail() -> bytes:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        cache.fetch(NAME, fail)
    assert list(folder.iterdir()) == []


def test_an_unwritable_cache_means_memory_only_and_one_warning_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # a folder cannot be made below a file, not even by root
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="set FEATUP_HUB_CACHE to a writable folder") as caught:
        cubins = [cache.fetch(NAME, lambda: IMAGE) for _ in range(3)]
    assert len(caught) == 1
    assert cubins == [cache.Cubin(image=IMAGE, path=None, hit=False)] * 3


def test_a_write_that_fails_half_way_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert cache.fetch(NAME, lambda: IMAGE).path is None
    assert list(folder.iterdir()) == []


def test_a_user_without_a_home_compiles_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATUP_HUB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.cache_folder() is None
    with pytest.warns(UserWarning, match="no home folder"):
        assert cache.fetch(NAME, lambda: IMAGE).path is None


def test_the_folder_is_the_packages_own_then_xdg_then_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("FEATUP_HUB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_folder() == tmp_path / ".cache" / "featup_hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "featup_hub"
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"


# The module is loaded by its path: it needs nothing of torch, which takes seconds to import.
WRITER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = sys.modules["cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
path = cache.cache_folder() / "raced.cubin"
for _ in range(20):
    cache._write(path, bytes([int(sys.argv[2])]) * 1_000_000)
    assert cache._read(path) is not None, "a reader saw half a file"
"""


def test_processes_that_write_at_once_never_show_each_other_half_a_file(folder: Path) -> None:
    command = [sys.executable, "-c", WRITER, cache.__file__]
    writers = [subprocess.Popen([*command, str(n)]) for n in (1, 2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert [path.name for path in folder.iterdir()] == ["raced.cubin"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.fetch("raced.cubin", never).hit
