"""Files are written atomically under any name; digests distinguish them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from featup_hub.files import write_atomically


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def half():
        with write_atomically(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        half()
    assert path.read_bytes() == b"old"
    with write_atomically(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_may_write_one_file_at_once(tmp_path):
    path = tmp_path / "out.bin"

    def write():
        with write_atomically(path) as partial:
            partial.write_bytes(b"other")

    with write_atomically(path) as partial:
        partial.write_bytes(b"whole")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write).result()
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed_and_what_running_ones_write_is_kept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / "out[1].bin"
    with write_atomically(path) as partial:
        _, short, *host, _, _, _ = partial.name.split(".")
        partial.touch()
    left = ".".join([short, *host])
    dead = tmp_path / f".{left}.{gone.pid}.1.partial"
    kept = [
        tmp_path / f".{left}.{os.getppid()}.1.partial",  # runs
        tmp_path / f".{short}.elsewhere.{gone.pid}.1.partial",  # of another machine
        tmp_path / f".other.{'.'.join(host)}.{gone.pid}.1.partial",  # of another file
    ]
    for file in (dead, *kept):
        file.write_bytes(b"half")
    with write_atomically(path) as partial:
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])
