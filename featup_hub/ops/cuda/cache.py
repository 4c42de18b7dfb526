"""Keeps compiled kernels on disk, so that only the first process waits for the compiler.

A file's name has a digest of all that its contents depend on. It ends with the digest of its
contents: a damaged file is detected and replaced.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from featup_hub.files import write_atomically

DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Returns ``$FEATUP_HUB_CACHE``, ``$XDG_CACHE_HOME/featup_hub`` or ``~/.cache/featup_hub``.

    Returns None for a user without a home folder.
    """
    if folder := os.environ.get("FEATUP_HUB_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "featup_hub")
    except RuntimeError:
        return None


def cubin_name(stem: str, architecture: int, *dependencies: object) -> str:
    """Names a file by a word, the architecture, and a digest of all that its contents depend on."""
    digest = hashlib.sha256(repr((architecture, *dependencies)).encode()).hexdigest()
    return f"{stem}-sm_{architecture}-{digest[:24]}.cubin"


def fetch(name: str, make: Callable[[], bytes]) -> tuple[bytes, Path | None]:
    """Returns machine code and its file.

    Args:
        name: From :func:`cubin_name`.
        make: Compiles it, if it is not in the cache.

    Returns:
        The code, and its path; None, with one warning, if it could not be written.
    """
    folder = cache_folder()
    if folder is None:
        _warn_once("no home folder")
        return make(), None
    path = folder / name
    if image := _read(path):
        return image, path
    image = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial:
            partial.write_bytes(image + hashlib.sha256(image).digest())
    except OSError as error:
        _warn_once(f"{error.strerror}: {folder}")
        return image, None
    return image, path


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"the compiled CUDA kernels could not be kept ({reason}), so every process will compile "
        "them again; set FEATUP_HUB_CACHE to a writable folder",
        stacklevel=3,
    )


def _read(path: Path) -> bytes | None:
    """Returns the code in a file; None if there is none, or the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    image, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return image if image and hashlib.sha256(image).digest() == digest else None
