"""Exceptions as one line."""

from __future__ import annotations

from featup_hub.cli.errors import explain


def test_exceptions_are_explained_in_a_line() -> None:
    assert explain(OSError(28, "No space left on device", "x.npy")) == (
        "x.npy: No space left on device"
    )
    assert explain(MemoryError()).startswith("not enough memory; try a smaller --size")
    assert explain(ValueError()) == "ValueError"
