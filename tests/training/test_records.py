"""Checkpoints that are none, metrics, and progress: a bar with tqdm, plain lines without."""

from __future__ import annotations

import sys

import pytest
import torch

from featup_hub.training.records import (
    Metrics,
    Progress,
    load_checkpoint,
    restoring,
    save_checkpoint,
)


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


@pytest.mark.parametrize("state", [{}, {"config": 3}, {"config": {"a": 1}}, [1]])
def test_a_checkpoint_of_another_kind_is_refused_in_one_sentence(tmp_path, state):
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of this trainer \(\w+\); remove") as e:
        load_checkpoint(tmp_path / "c.pt", {"lr": 1.0})
    assert "\n" not in str(e.value)


def test_what_is_missing_from_a_checkpoint_is_damage_too(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"config": {"lr": 1.0}})
    with pytest.raises(ValueError, match="damaged"), restoring(tmp_path / "c.pt"):
        load_checkpoint(tmp_path / "c.pt", {"lr": 1.0})["stack"]


def test_differing_digests_are_not_spelt_out(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"config": {"image": "a" * 64, "lr": 1.0}})
    with pytest.raises(ValueError, match=r"\(image: another one; lr: 1.0 there, 2.0 here\)"):
        load_checkpoint(tmp_path / "c.pt", {"image": "b" * 64, "lr": 2.0})


def test_what_only_new_checkpoints_tell_must_agree_where_it_is_told(tmp_path):
    seen, other = {"photographs": "a" * 64}, {"photographs": "b" * 64}
    save_checkpoint(tmp_path / "old.pt", {"config": {"lr": 1.0}})
    save_checkpoint(tmp_path / "new.pt", {"config": {"lr": 1.0, **seen}})
    for name in ("old.pt", "new.pt"):
        assert load_checkpoint(tmp_path / name, {"lr": 1.0}, seen=seen)["config"]["lr"] == 1.0
    assert load_checkpoint(tmp_path / "old.pt", {"lr": 1.0}, seen=other)
    with pytest.raises(ValueError, match=r"\(photographs: another one\); repeat its options"):
        load_checkpoint(tmp_path / "new.pt", {"lr": 1.0}, seen=other)
