"""What a person sees: progress, and exceptions in a line."""

from __future__ import annotations

import io

import pytest

from featup_hub.cli.terminal import Progress, duration, explain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    progress = Progress(3, stream=terminal)
    for name in ("a.jpg", "x" * 80):
        progress.begin(name)
        progress.end("wrote it")
    progress.begin("c.jpg")
    progress.fail("c.jpg is broken")
    progress.finish("in out")
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert drawn[1] == "[1/3] a.jpg"
    assert drawn[2].endswith("…")
    assert max(map(len, drawn)) <= 39
    assert "c.jpg, about 0 s left" in drawn[3]
    assert "\n" not in terminal.getvalue()
    out, err = capsys.readouterr()
    assert out.startswith("2 written, 0 kept, 1 failed in out")
    assert err == "error: c.jpg is broken\n"


def test_exceptions_are_explained_in_a_line() -> None:
    assert explain(OSError(28, "No space left on device", "x.npy")) == (
        "x.npy: No space left on device"
    )
    assert explain(MemoryError()).startswith("not enough memory; try a smaller --size")
    assert explain(ValueError()) == "ValueError"
    assert duration(100) == "2 min"
