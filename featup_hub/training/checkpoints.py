"""Files of a running training: checkpoints and metrics."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from featup_hub.files import write_atomically

__all__ = ["Metrics", "load_checkpoint", "restoring", "save_checkpoint"]

_ABSENT = {
    **{"parts": 1, "region_noise": 0},
    **{"downsampler": "attention", "window": 1, "kernel_taps": ()},
}
"""Entries of the config that only some versions have, with the value that changes nothing."""


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Writes a checkpoint; an interrupted write leaves the old file."""
    with write_atomically(path) as partial:
        torch.save(dict(state), partial)


def load_checkpoint(path: Path, config: Mapping[str, object]) -> dict[str, Any]:
    """Reads a checkpoint of a run with the same config.

    Args:
        path: The checkpoint.
        config: What must equal the checkpoint's "config". Digests may be missing there.

    Raises:
        ValueError: If the file is not a checkpoint, or has another config or unknown options.
    """
    with restoring(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found: dict[str, object] = dict(state["config"])
        if not found.keys() & config.keys():
            raise KeyError("config")
    # Options that another version has, with a value that changes something.
    unknown = {
        key: value
        for key, value in found.items()
        if not (key in config or _is_digest(value) or _ABSENT.get(key) == value)
    }
    if unknown:
        listed = ", ".join(f"{key}: {value}" for key, value in unknown.items())
        raise ValueError(
            f"{path} belongs to a run with options that this version lacks ({listed}); "
            "go on with the version that wrote it, or remove it to start again"
        )
    digests = {key: value for key, value in config.items() if _is_digest(value)}
    theirs, ours = {**_ABSENT, **digests, **found}, {**_ABSENT, **config}
    if differing := sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k)):
        changes = "; ".join(
            f"{k}: another one"
            if _is_digest(ours.get(k))
            else f"{k}: {theirs.get(k)} there, {ours.get(k)} here"
            for k in differing
        )
        raise ValueError(
            f"{path} belongs to a run of another config ({changes}); "
            "repeat its options to go on, or remove it to start again"
        )
    return state


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turns any error inside into a ValueError that names the damaged checkpoint."""
    try:
        yield
    except Exception as error:  # unpickling damaged bytes may raise any exception
        # torch's message advises unsafe unpickling, so it is not shown.
        raise ValueError(
            f"{path} is damaged or not a checkpoint of this trainer ({type(error).__name__}); "
            "remove it to start again, or choose another place"
        ) from None


class Metrics:
    """A CSV file with one row per step. A resumed run appends to it.

    Args:
        path: The file.
        first: First step of this run. Rows of this and later steps are dropped: the earlier run
            wrote them after its last checkpoint, perhaps incompletely.
    """

    def __init__(self, path: Path, first: int) -> None:
        resumes = first > 0 and path.is_file()
        self._file = path.open("r+" if resumes else "w", newline="")
        if resumes:
            self._file.truncate(_size_before(path, first))
            self._file.seek(0, os.SEEK_END)
        self._flushed = time.monotonic()

    def add(self, row: Mapping[str, object]) -> None:
        """Appends a row; all have the same columns."""
        writer = csv.DictWriter(self._file, list(row))
        if self._file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        if time.monotonic() - self._flushed > 10:
            self.flush()

    def flush(self) -> None:
        """Flushes all rows to the operating system."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _size_before(path: Path, first: int) -> int:
    """Returns the bytes before the first row that is incomplete or of step ``first`` or later."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            step = line.partition(b",")[0]
            earlier = step == b"step" or (step.isdigit() and int(step) < first)
            if not (earlier and line.endswith(b"\n")):
                break
            size += len(line)
    return size
