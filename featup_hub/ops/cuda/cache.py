"""Keeps compiled kernels on disk, so that only the first process waits for the compiler.

A file's name has a digest of all that its contents depend on. It is written under a temporary name
and renamed, so readers never see a partial file. It ends with the digest of its contents: a damaged
file is detected, deleted and made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cubin", "cache_folder", "cubin_name", "fetch"]

DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """Machine code and its file.

    Attributes:
        image: The code.
        path: Its file; None if it could not be written.
        hit: Whether it came from the cache.
    """

    image: bytes
    path: Path | None
    hit: bool


def cache_folder() -> Path | None:
    """Returns ``$FEATUP_HUB_CACHE``, ``$XDG_CACHE_HOME/featup_hub`` or ``~/.cache/featup_hub``.

    Returns None for a user without a home folder.
    """
    if folder := os.environ.get("FEATUP_HUB_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "featup_hub")
    try:
        return Path.home() / ".cache" / "featup_hub"
    except RuntimeError:
        return None


def cubin_name(stem: str, architecture: int, *dependencies: object) -> str:
    """Makes a file name from the program and all that its contents depend on.

    Args:
        stem: A readable word.
        architecture: Compute capability times ten.
        dependencies: Source, options, compiler version: values with a complete ``repr``.

    Returns:
        A file name such as ``jbu-sm_90-0123456789abcdef01234567.cubin``.
    """
    digest = hashlib.sha256(repr((architecture, *dependencies)).encode()).hexdigest()
    return f"{stem}-sm_{architecture}-{digest[:24]}.cubin"


def fetch(name: str, make: Callable[[], bytes]) -> Cubin:
    """Returns the cubin of this name, from the cache or from the compiler.

    If the cache cannot be written, the cubin is kept in memory only, with one warning.

    Args:
        name: From :func:`cubin_name`.
        make: Compiles it.

    Returns:
        The cubin.
    """
    folder = cache_folder()
    path = None if folder is None else folder / name
    if path is not None and (image := _read(path)) is not None:
        return Cubin(image=image, path=path, hit=True)
    image = make()
    try:
        if path is None:
            raise OSError("no home folder")
        _write(path, image)
    except OSError as error:
        _warn_once(f"{error.strerror or error}: {folder}")
        path = None
    return Cubin(image=image, path=path, hit=False)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"the compiled CUDA kernels could not be kept ({reason}), so every process will compile "
        "them again; set FEATUP_HUB_CACHE to a writable folder",
        stacklevel=3,
    )


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    image, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if image and hashlib.sha256(image).digest() == digest:
        return image
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _write(path: Path, image: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image + hashlib.sha256(image).digest())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
