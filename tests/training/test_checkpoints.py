"""Checkpoints and metrics: damage, other runs, killed runs."""

from __future__ import annotations

import pytest
import torch

from featup_hub.training.checkpoints import (
    add_metrics,
    load_checkpoint,
    open_metrics,
    save_checkpoint,
)
from tests.conftest import full_disk


@pytest.mark.parametrize("torn", ["9", "100", "100,0.4\n101,0.4\n", "x" * 5000, "", None])
def test_metrics_go_on_after_the_checkpoint_whatever_a_killed_run_left(tmp_path, torn):
    kept = "" if torn is None else "98,0.6\n99,0.333333\n"
    if torn is not None:
        (tmp_path / "m.csv").write_text(f"step,loss\n{kept}{torn}")
    with open_metrics(tmp_path / "m.csv", 100) as metrics:
        add_metrics(metrics, {"step": 100, "loss": 1 / 3})
        # A reader sees every row at once.
        assert (tmp_path / "m.csv").read_text() == f"step,loss\n{kept}100,0.333333\n"


def test_a_full_disk_is_an_error_that_names_the_checkpoint(tmp_path):
    with full_disk(3000), pytest.raises(OSError, match=r"File too large.*c\.pt"):
        save_checkpoint(tmp_path / "c.pt", {"a": torch.zeros(5000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{}, {"config": 3}, {"config": {"lr": 1.0}}, [1]])
def test_a_checkpoint_of_another_kind_is_refused_in_one_sentence(tmp_path, state):
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of this trainer \(\w+\); remove") as e:
        load_checkpoint(tmp_path / "c.pt", {"lr": 1.0}, lambda state: state["stack"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "change"),
    [
        ({"lr": 1.0}, {"lr": 2.0}, "lr: 1.0 there, 2.0 here"),
        ({"window": 2.0}, {}, "window: 2.0 there, none here"),
        ({}, {"parts": 2}, "parts: none there, 2 here"),
        ({"image": "a" * 64}, {"image": "b" * 64}, "image: another one"),
        ({"weights of a": "a" * 64}, {}, "weights of a: another one"),
    ],
)
def test_another_config_is_refused_and_digests_are_not_spelt_out(tmp_path, theirs, ours, change):
    save_checkpoint(tmp_path / "c.pt", {"config": {"seed": 1, **theirs}})
    with pytest.raises(ValueError, match=rf"another config \({change}\); repeat its options"):
        load_checkpoint(tmp_path / "c.pt", {"seed": 1, **ours}, lambda state: None)
