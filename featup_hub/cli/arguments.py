"""Checks arguments of several commands, and explains errors. Its import does not import torch."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from featup_hub.registry import ModelCard


class UsageError(ValueError):
    """The arguments are wrong, whatever the files contain; exit code 2."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns an error about a value or a missing file into a UsageError."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(explain(error)) from error


def complain(problem: str, kind: str = "error") -> None:
    """Prints an error or a warning to stderr."""
    sys.stdout.flush()
    print(f"{kind}: {problem}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """Describes an exception to the user in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return f"not enough memory; try a smaller --size ({text.splitlines()[0]})"
    return text


def choose_backbone(spec: str, upsampler: str) -> tuple[ModelCard, Path | None]:
    """Returns the card and file of ``NAME[=FILE]``; both and the upsampler must exist."""
    from featup_hub.loading import find_backbone
    from featup_hub.weights import resolve

    with usage_errors():
        resolve(upsampler)
        return find_backbone(spec)


class Choice(NamedTuple):
    """A model that exists but is not loaded: its stride, the images' size, options of ``load``."""

    card: ModelCard
    stride: int
    size: int | tuple[int, int]
    options: dict[str, Any]


def choose_model(
    args: argparse.Namespace,
    *,
    size: int | tuple[int, int] | None = None,
    device: str = "cpu",
) -> Choice:
    """Finds the model that the flags name, and checks the size of images and the device."""
    from featup_hub.image import check_size
    from featup_hub.loading import open_device, stride_and_size

    card, file = choose_backbone(args.model, args.upsampler)
    with usage_errors():
        place = open_device(device)
        stride, usual = stride_and_size(card, layer=args.layer, looks=args.looks)
        size = usual if size is None else size
        check_size(size, multiple_of=stride)
    options = {
        "backbone_weights": file,
        "upsampler": args.upsampler,
        "use_norm": not args.no_norm,
        "layer": args.layer,
        "looks": args.looks,
        "device": place,
    }
    return Choice(card, stride, size, options)


def check_output(path: Path, suffix: str | None = None) -> None:
    """Checks, before the work, that a file can be written, and its suffix if one is given."""
    try:
        if path.is_dir():
            raise UsageError(f"a file to write is needed; {path} is a folder; name a file in it")
        _check_folder(path.parent)
    except OSError as error:
        raise UsageError(
            f"the file to write needs a folder that takes new files; got {path} "
            f"({error.strerror}); make the folder, or name another"
        ) from error
    if suffix and path.suffix != suffix:
        raise UsageError(f"the file to write must be named *{suffix}; got {path}")


def make_folder(out: Path) -> None:
    """Makes the folder of outputs, or raises UsageError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_folder(out)
    except OSError as error:
        raise UsageError(
            f"--out must be a folder that takes new files; {out}: {error.strerror}"
        ) from error


def _check_folder(folder: Path) -> None:
    """Raises OSError if a folder takes no files; permissions do not tell: root has all of them."""
    with tempfile.TemporaryFile(dir=folder):
        pass
