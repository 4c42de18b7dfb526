"""The cubin cache: files are reused, remade when damaged, never partial, optional."""

from __future__ import annotations

from pathlib import Path

import pytest

from featup_hub.ops.cuda import cache

NAME = cache.cubin_name("jbu", 90, "source", ("-O3",), "13.0")
IMAGE = b"\x7fELF" + bytes(range(256))


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    cache._warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make() -> bytes:
    return IMAGE


def never() -> bytes:
    raise AssertionError("the compiler was called although the cubin is cached")


def test_a_second_fetch_reads_what_the_first_one_wrote_and_nothing_else_is_left(folder):
    assert cache.fetch(NAME, make) == cache.fetch(NAME, never) == (IMAGE, folder / NAME)
    assert list(folder.iterdir()) == [folder / NAME]


def test_whatever_decides_the_code_decides_its_name():
    parts = ("jbu", 90, "source", ("-O3",), "13.0")
    others = enumerate((80, "source ", ("-O2",), "13.1"), start=1)
    names = {
        cache.cubin_name(*parts[:place], other, *parts[place + 1 :]) for place, other in others
    }
    assert len(names | {NAME}) == 5


def flipped(content: bytes, byte: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        *[lambda content, n=n: flipped(content, n) for n in (0, 100, len(IMAGE), -1)],
        *[lambda content, n=n: content[:n] for n in (0, 1, 32, len(IMAGE))],
    ],
)
def test_damage_is_noticed_and_the_cubin_made_anew(folder, damage):
    assert callable(damage)
    cache.fetch(NAME, make)
    (folder / NAME).write_bytes(damage((folder / NAME).read_bytes()))
    with pytest.raises(AssertionError, match="the compiler was called"):
        cache.fetch(NAME, never)
    assert cache.fetch(NAME, make) == cache.fetch(NAME, never) == (IMAGE, folder / NAME)


def test_a_write_that_fails_half_way_leaves_nothing(folder, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert cache.fetch(NAME, make) == (IMAGE, None)
    assert list(folder.iterdir()) == []


def test_a_user_without_a_home_compiles_in_memory(monkeypatch):
    monkeypatch.delenv("FEATUP_HUB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="no home folder"):
        assert cache.fetch(NAME, make) == (IMAGE, None)


def test_the_folder_is_the_packages_own_then_xdg_then_the_home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("FEATUP_HUB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_folder() == tmp_path / ".cache" / "featup_hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "featup_hub"
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
