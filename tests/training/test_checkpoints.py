"""Checkpoints and metrics: damage, other runs, killed runs."""

from __future__ import annotations

import csv

import pytest
import torch

from featup_hub.training.checkpoints import (
    Metrics,
    load_checkpoint,
    restoring,
    save_checkpoint,
)


def test_metrics_can_be_read_while_a_run_goes_on(tmp_path):
    with Metrics(tmp_path / "m.csv", 0) as metrics:
        metrics.add({"step": 0, "loss": 1 / 3, "source": "a"})
        metrics.flush()
        assert (tmp_path / "m.csv").read_text() == "step,loss,source\n0,0.333333,a\n"


def resumed(path, first):
    """What a run that goes on leaves of the metrics of an earlier one."""
    with Metrics(path, first) as metrics:
        metrics.add({"step": first, "loss": 0.4})
    return path.read_text().split()


@pytest.mark.parametrize("torn", ["15", "1", "15,", "150,0.4", "15,0.4,7", "x,0.4", ""])
def test_a_row_that_a_kill_cut_short_is_not_kept(tmp_path, torn):
    path = tmp_path / "m.csv"
    path.write_text(f"step,loss\n98,0.6\n99,0.5\n{torn}")
    assert resumed(path, 100) == ["step,loss", "98,0.6", "99,0.5", "100,0.4"]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,loss\n", "ste", "\0\0,\0"])
def test_metrics_without_a_row_to_keep_are_begun_anew(tmp_path, text):
    path = tmp_path / "m.csv"
    path.write_text(text)
    assert resumed(path, 100) == ["step,loss", "100,0.4"]


def test_a_kill_while_the_kept_rows_are_written_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "m.csv"
    before = "step,loss\n98,0.6\n99,0.5\n"
    path.write_text(before)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        Metrics(path, 100)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.csv"]


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
        assert load_checkpoint(tmp_path / name, {"lr": 1.0}, digests=seen)["config"]["lr"] == 1.0
    assert load_checkpoint(tmp_path / "old.pt", {"lr": 1.0}, digests=other)
    with pytest.raises(ValueError, match=r"\(photographs: another one\); repeat its options"):
        load_checkpoint(tmp_path / "new.pt", {"lr": 1.0}, digests=other)
