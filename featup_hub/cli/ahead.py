"""Reads the next inputs while the present one is computed, and never more than a few."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

S = TypeVar("S")
T = TypeVar("T")


def ahead(
    items: Iterable[S], read: Callable[[S], T], *, depth: int
) -> Iterator[tuple[S, Future[T]]]:
    """Yields every item, in order, with what is read for it.

    Another thread reads, at most ``depth`` items beyond the one that was yielded last, so memory
    is bounded however many there are. What a read raises is raised by its own ``result()``.

    Args:
        items: What to read for.
        read: Reads for one item.
        depth: Number of items to read ahead.

    Example:
        >>> [(item, read.result()) for item, read in ahead("ab", str.upper, depth=1)]
        [('a', 'A'), ('b', 'B')]
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    waiting: deque[tuple[S, Future[T]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:  # who stops early waits for no more than the read in progress
        pool.shutdown(cancel_futures=True)
