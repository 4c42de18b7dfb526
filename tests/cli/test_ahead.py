"""Reading ahead: in order, within bounds, every failure where it belongs, nothing left running."""

from __future__ import annotations

import threading
import time

import pytest

from featup_hub.cli.ahead import ahead


def test_items_come_in_order_with_what_was_read() -> None:
    for count in (0, 1, 2, 3, 10):
        found = [(item, read.result()) for item, read in ahead(range(count), str, depth=2)]
        assert found == [(n, str(n)) for n in range(count)]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_is_read_than_the_depth_allows(depth: int) -> None:
    read: list[int] = []
    for item, result in ahead(range(20), read.append, depth=depth):
        result.result()
        time.sleep(0.002)  # the reader has all the time to run away
        assert len(read) <= item + 1 + depth
    assert read == list(range(20))


def test_the_next_is_read_while_one_is_worked_on() -> None:
    done = [threading.Event() for _ in range(3)]
    for item, result in ahead(range(3), lambda n: done[n].set(), depth=1):
        result.result()
        assert done[min(item + 1, 2)].wait(60)


def test_a_failure_belongs_to_its_item_and_the_others_go_on() -> None:
    found = []
    for item, read in ahead([2, 0, 1], lambda n: 2 // n, depth=2):
        try:
            found.append(read.result())
        except ZeroDivisionError:
            found.append(item)
    assert found == [1, 0, 2]


def test_who_stops_early_leaves_no_thread_and_reads_no_more() -> None:
    read: list[int] = []
    for _, result in ahead(range(100), read.append, depth=4):
        result.result()
        break
    time.sleep(0.01)
    assert len(read) <= 5
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
