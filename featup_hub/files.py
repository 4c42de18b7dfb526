"""Atomic writes of files, and digests of files and tensors."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to ``path`` if no error is raised.

    A file named ``path`` is therefore always complete, even if the process is killed. Temporary
    files of the same target that killed processes of this machine left behind are removed. A link
    is replaced, not followed.
    """
    path = Path(path)
    short = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # names may be 255 bytes long
    own = f".{short}.{socket.gethostname()}."
    partial = path.with_name(f"{own}{os.getpid()}.{threading.get_ident()}.partial")
    for left in path.parent.glob(f"{own}*.partial"):
        if not _is_running(left.name.removeprefix(own).partition(".")[0]):
            left.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # a full disk names no file, others our temporary one
        if error.errno and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def sha256_of_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file, 64 hexadecimal digits."""
    total = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of tensors with their names, types and shapes, 64 hexadecimal digits.

    Example:
        >>> a, b = {"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2)}
        >>> sha256_of_tensors(a) == sha256_of_tensors(b)
        False
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _is_running(pid: str) -> bool:
    """Returns whether a process runs; True if that cannot be known."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)  # signal 0 only checks that the process exists
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
