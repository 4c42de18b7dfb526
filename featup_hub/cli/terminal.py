"""Terminal output: one-line errors, and progress."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, NoReturn

__all__ = ["Parser", "Progress", "UsageError", "complain", "explain"]


class UsageError(ValueError):
    """The arguments are wrong, whatever the files contain; exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors.

    Flags cannot be abbreviated, so that a new flag does not break scripts.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


class Progress:
    """Shows progress: a bar on a terminal, else a line per item.

    Args:
        total: Number of items to come.
    """

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.total = total
        self.live = total > 1 and sys.stderr.isatty()
        self.start = time.monotonic()
        self.written = self.kept = self.failed = 0
        self._bar = tqdm(total=total, unit="image", disable=not self.live, leave=False)

    def begin(self, item: str) -> None:
        """Shows the item about to be worked on, on a terminal."""
        self._bar.set_description(item)

    def end(self, report: str) -> None:
        """Counts an item as written; prints its report if there is no bar."""
        self.written += 1
        self._bar.update()
        if not self.live:
            number = self.written + self.kept + self.failed
            counter = f"[{number}/{self.total}] " if self.total > 1 else ""
            print(f"{counter}{report}", flush=True)

    def skip(self, count: int, report: str) -> None:
        """Counts items as kept from an earlier run."""
        self.kept += count
        self._bar.update(count)
        print(report, flush=True)

    def fail(self, problem: str) -> None:
        """Counts an item as failed and prints the reason."""
        self.failed += 1
        self._bar.update()
        with self._bar.external_write_mode():
            complain(problem)

    def finish(self, where: str) -> None:
        """Prints the counts if there was more than one item."""
        self._bar.close()
        if self.total > 1:
            took = duration(time.monotonic() - self.start)
            counts = f"{self.written} written, {self.kept} kept, {self.failed} failed"
            print(f"{counts} {where}, {took}", flush=True)


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


def duration(seconds: float) -> str:
    """Formats a duration for people.

    Example:
        >>> duration(7.4), duration(430), duration(9000)
        ('7 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
