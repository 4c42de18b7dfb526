"""Files of a running training: the checkpoint and the metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

import torch

from featup_hub.files import write_atomically


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Writes a checkpoint; an interrupted write leaves the old file."""
    whole = BytesIO()  # PyTorch's own writer does not tell why a write fails
    torch.save(dict(state), whole)
    with write_atomically(path) as partial, partial.open("wb") as file:
        file.write(whole.getbuffer())


def load_checkpoint(
    path: Path, config: Mapping[str, object], load: Callable[[Mapping[str, Any]], None]
) -> None:
    """Reads a checkpoint of a run with the same config, and passes its state to ``load``."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changes = list(_changes(state["config"], config))
        if not changes:
            load(state)
    except Exception as error:  # unpickling damaged bytes may raise any exception
        # torch's message advises unsafe unpickling, so it is not shown.
        raise ValueError(
            f"{path} is damaged or not a checkpoint of this trainer ({type(error).__name__}); "
            "remove it to start again, or choose another place"
        ) from None
    if changes:
        raise ValueError(
            f"{path} belongs to a run of another config ({'; '.join(changes)}); repeat its "
            "options, with the version that wrote it, to go on, or remove it to start again"
        )


def _changes(theirs: Mapping[str, object], ours: Mapping[str, object]) -> Iterator[str]:
    for key in sorted({*theirs, *ours}):
        there, here = theirs.get(key, "none"), ours.get(key, "none")
        is_digest = any(isinstance(value, str) and len(value) == 64 for value in (there, here))
        if there != here:
            yield f"{key}: another one" if is_digest else f"{key}: {there} there, {here} here"


def open_metrics(path: Path, first: int) -> TextIO:
    """Opens a CSV file with one row per step; every row is written at once.

    A resumed run appends to it. Rows of its ``first`` and later steps are dropped: the earlier run
    wrote them after its last checkpoint, perhaps incompletely.
    """
    lines = path.read_bytes().splitlines(keepends=True) if first and path.is_file() else []
    with write_atomically(path) as partial:
        partial.write_bytes(b"".join(line for line in lines if _is_earlier(line, first)))
    return path.open("a", newline="", buffering=1)


def _is_earlier(line: bytes, first: int) -> bool:
    step = line.partition(b",")[0]
    return line.endswith(b"\n") and (step == b"step" or (step.isdigit() and int(step) < first))


def add_metrics(file: TextIO, row: Mapping[str, object]) -> None:
    """Appends a row; all have the same columns."""
    writer = csv.DictWriter(file, list(row))
    if file.tell() == 0:
        writer.writeheader()
    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
