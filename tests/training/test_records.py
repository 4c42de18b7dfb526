"""Progress: a bar where tqdm is there, plain lines where it is not, silence where not wanted."""

from __future__ import annotations

import sys

from featup_hub.training.records import Metrics, Progress


def test_without_tqdm_progress_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress(3, 0, True, seconds=60) as bar:
        for n in range(3):
            bar.advance(f"loss {n}")
    assert capsys.readouterr().err == "step 1/3 loss 0\nstep 3/3 loss 2\n"


def test_with_tqdm_progress_is_a_bar(capsys):
    with Progress(3, 1, True) as bar:
        bar.advance("x")
        bar.advance("loss 2")
    assert "3/3" in capsys.readouterr().err


def test_progress_can_be_silent(capsys):
    with Progress(1, 0, False) as bar:
        bar.advance("loss")
    assert capsys.readouterr().err == ""


def test_metrics_can_be_read_while_a_run_goes_on(tmp_path):
    with Metrics(tmp_path / "m.csv", 0) as metrics:
        metrics.add({"step": 0, "loss": 1 / 3, "source": "a"})
        metrics.flush()
        assert (tmp_path / "m.csv").read_text() == "step,loss,source\n0,0.333333,a\n"
