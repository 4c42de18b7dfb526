"""What a person sees: errors of one line, and progress."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import Any, NoReturn, TextIO

__all__ = ["Parser", "Progress", "UsageError", "complain", "explain"]


class UsageError(ValueError):
    """What was typed cannot work, whatever the files hold; the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are raised, to be shown as all others are.

    Flags cannot be abbreviated: a script must not break when one is added.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


class Progress:
    """Tells how far a command is: one line kept up to date on a terminal, else a line per item.

    Args:
        total: Number of items to come.
        stream: Where the line is drawn; default: stderr.
    """

    def __init__(self, total: int, *, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.live = total > 1 and self.stream.isatty()
        self.start = time.monotonic()
        self.written = self.kept = self.failed = 0

    def begin(self, item: str) -> None:
        """Shows the item about to be worked on, on a terminal."""
        if not self.live:
            return
        number = self.written + self.kept + self.failed + 1
        text = f"[{number}/{self.total}] {item}"
        if self.written:
            left = (time.monotonic() - self.start) / self.written * (self.total - number + 1)
            text = f"{text}, about {duration(left)} left"
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r\x1b[K{text if len(text) <= width else text[: width - 1] + '…'}")
        self.stream.flush()

    def end(self, report: str) -> None:
        """Counts an item as written; its report is printed unless a line is kept up to date."""
        self.written += 1
        if not self.live:
            number = self.written + self.kept + self.failed
            counter = f"[{number}/{self.total}] " if self.total > 1 else ""
            print(f"{counter}{report}", flush=True)

    def skip(self, count: int, report: str) -> None:
        """Counts items as kept from an earlier run."""
        self.kept += count
        print(report, flush=True)

    def fail(self, problem: str) -> None:
        """Counts an item as failed and tells why."""
        self.failed += 1
        self._clear()
        complain(problem)

    def finish(self, where: str) -> None:
        """Sums up, where there was more than one item."""
        self._clear()
        if self.total > 1:
            took = duration(time.monotonic() - self.start)
            counts = f"{self.written} written, {self.kept} kept, {self.failed} failed"
            print(f"{counts} {where}, {took}", flush=True)

    def _clear(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def complain(problem: str) -> None:
    """Prints an error to stderr."""
    sys.stdout.flush()
    print(f"error: {problem}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """Says in a line what an exception means to a user."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return f"not enough memory; try a smaller --size ({text.splitlines()[0]})"
    return text


def duration(seconds: float) -> str:
    """Says a time as a person would.

    Example:
        >>> duration(7.4), duration(430), duration(9000)
        ('7 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
