"""Terminal output: progress, and one-line errors."""

from __future__ import annotations

import pytest

from featup_hub.cli.terminal import Progress, duration, explain


def test_on_a_terminal_progress_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(3)
    for name in ("a.jpg", "b.jpg"):
        progress.begin(name)
        progress.end("wrote it")
    progress.fail("c.jpg is broken")
    progress.finish("in out")
    out, err = capsys.readouterr()
    assert out.startswith("2 written, 0 kept, 1 failed in out")
    assert "b.jpg:  33%" in err
    assert "\rerror: c.jpg is broken\n" in err
    assert err.count("\n") == 1


def test_exceptions_are_explained_in_a_line() -> None:
    assert explain(OSError(28, "No space left on device", "x.npy")) == (
        "x.npy: No space left on device"
    )
    assert explain(MemoryError()).startswith("not enough memory; try a smaller --size")
    assert explain(ValueError()) == "ValueError"
    assert duration(100) == "2 min"
