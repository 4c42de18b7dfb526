"""Digests of what a run was made with: a checkpoint tells by them whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["digest_of_files"]


def digest_of_files(paths: Sequence[Path], folder: Path) -> str:
    """Returns the sha256 of files' names below a folder and of their sizes, in hexadecimal.

    It reads no file, for there may be very many; the folder may have been moved.
    """
    total = hashlib.sha256()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        total.update(f"{name!r} {path.stat().st_size};".encode())
    return total.hexdigest()
