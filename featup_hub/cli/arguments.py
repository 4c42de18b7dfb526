"""Arguments of several commands, checked, and their errors. Its import does not import torch."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from featup_hub.registry import ModelCard


class UsageError(ValueError):
    """The arguments are wrong, whatever the files contain; exit code 2."""


@contextmanager
def usage_errors(prefix: str = "", suffix: str = "") -> Iterator[None]:
    """Turns an error about a value or a missing file into a UsageError."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{prefix}{explain(error)}{suffix}") from error


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


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names a backbone."""
    parser.add_argument(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME[=FILE]",
        help="the backbone, and a file with its weights if they are your own "
        "(default: %(default)s)",
    )


def choose_backbone(spec: str) -> tuple[ModelCard, Path | None]:
    """Returns the card and the file of ``NAME[=FILE]``, both known to exist."""
    from featup_hub.loading import find_backbone

    with usage_errors():
        return find_backbone(spec)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a model."""
    add_backbone(parser)
    add = parser.add_argument
    add(
        "--upsampler",
        default="jbu_denoise",
        metavar="NAME|FILE",
        help="%(default)s (default), jbu_faithful, or a file",
    )
    add("--no-norm", action="store_true", help="do not normalise features before upsampling")
    add("--layer", type=int, metavar="N", help="take the features of this block of the backbone")
    add(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="run the backbone on N shifted copies of the image, 4 or 9, and combine the maps, at "
        "N times the cost (default: %(default)s)",
    )


def choose_model(args: argparse.Namespace) -> tuple[ModelCard, dict[str, Any]]:
    """Returns the card of the model that the flags name, and the options of ``load``."""
    from featup_hub.weights.files import resolve

    card, file = choose_backbone(args.model)
    with usage_errors():
        upsampler = resolve(args.upsampler)
    return card, {
        "backbone_weights": file,
        "upsampler": upsampler,
        "use_norm": not args.no_norm,
        "layer": args.layer,
        "looks": args.looks,
    }


def parse_size(text: str) -> int | tuple[int, int]:
    """Reads a size: 448 is the short side, 448x640 is height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(
            f"a size is a number, such as 448, or HxW, 448x640; got {text!r}"
        )
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def open_device(name: str | None) -> torch.device:
    """Returns a device after testing it; by default cuda if there is one, else cpu."""
    import torch

    from featup_hub import loading

    with usage_errors("--"):
        return loading.open_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_output(path: Path, suffix: str | None = None) -> None:
    """Checks, before the work, that a file can be written, and its suffix if one is given."""
    try:  # permissions are not enough: root has all, and some file systems are read-only
        if path.is_dir():
            raise UsageError(f"a file to write is needed; {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(
                f"the file to write needs a folder that exists; got {path}; make the folder "
                f"{path.parent}"
            )
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".featup-hub-"):
            pass
    except OSError as error:
        raise UsageError(
            f"the file to write needs a folder that takes new files; got {path} "
            f"({error.strerror}); name another"
        ) from error
    if suffix and path.suffix != suffix:
        raise UsageError(f"the file to write must be named *{suffix}; got {path}")


def make_folder(out: Path) -> None:
    """Makes the folder of outputs, or raises UsageError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must be a folder; {explain(error)}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UsageError(f"--out must be a folder that can be written to; {out} cannot")
