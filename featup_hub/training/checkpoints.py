"""Files of a running training: checkpoints and metrics."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from featup_hub.files import write_atomically

__all__ = ["Metrics", "load_checkpoint", "restoring", "save_checkpoint"]


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Writes a checkpoint; an interrupted write leaves the old file."""
    with write_atomically(path) as partial:
        torch.save(dict(state), partial)


def load_checkpoint(
    path: Path,
    config: Mapping[str, object],
    *,
    digests: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """Reads a checkpoint of a run with the same config.

    Args:
        path: The checkpoint.
        config: Fields that must equal the checkpoint's "config".
        digests: Further entries of "config" that must be equal. Old checkpoints may lack them.

    Raises:
        ValueError: If the file is not a checkpoint, or has another config.
    """
    with restoring(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs: dict[str, object] = dict(state["config"])
        if not theirs.keys() & config.keys():
            raise KeyError("config")
    theirs, ours = {**digests, **theirs}, {**config, **digests}
    keys = sorted({*theirs, *ours})
    if differing := [k for k in keys if theirs.get(k) != ours.get(k)]:
        changes = "; ".join(_difference(k, theirs.get(k), ours.get(k)) for k in differing)
        raise ValueError(
            f"{path} belongs to a run of another config ({changes}); "
            "repeat its options to go on, or remove it to start again"
        )
    return state


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


def _difference(key: str, theirs: object, ours: object) -> str:
    """Describes how an entry differs, without printing digests."""
    if all(isinstance(value, str) and len(value) == 64 for value in (theirs, ours)):
        return f"{key}: another one"
    return f"{key}: {theirs} there, {ours} here"


class Metrics:
    """A CSV file with one row per step. A resumed run appends to it.

    Args:
        path: The file.
        first: First step of the resumed run. Rows from this step on are dropped: the earlier run
            wrote them after its last checkpoint.
    """

    def __init__(self, path: Path, first: int) -> None:
        kept = _complete_rows(path, first) if first and path.exists() else []
        if kept:
            # Atomic: an interruption must not lose the kept rows.
            with write_atomically(path) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(kept[0]))
                writer.writeheader()
                writer.writerows(kept)
        self._file = path.open("a" if kept else "w", newline="")
        self._writer = csv.DictWriter(self._file, list(kept[0])) if kept else None
        self._flushed = time.monotonic()

    def add(self, row: Mapping[str, object]) -> None:
        """Appends a row. The first row defines the columns."""
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row))
            self._writer.writeheader()
        self._writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        )
        if time.monotonic() - self._flushed > 10:
            self.flush()

    def flush(self) -> None:
        """Flushes all rows to the operating system."""
        self._file.flush()
        self._flushed = time.monotonic()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _complete_rows(path: Path, end: int) -> list[dict[str, str]]:
    """Returns the complete rows of steps before ``end``.

    A killed run may leave a truncated last row: "15" of "150,0.4" is not step 15.
    """
    with path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [
        row
        for row in rows
        if None not in row  # csv's key of surplus fields
        and all(row.values())  # None where fields are missing
        and row.get("step", "").isdecimal()
        and int(row["step"]) < end
    ]
