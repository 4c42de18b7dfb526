"""Errors as one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "complain", "explain", "usage_errors"]


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
