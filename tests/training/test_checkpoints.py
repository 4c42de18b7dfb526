"""Checkpoints and metrics: damage, other runs, killed runs."""

from __future__ import annotations

import pytest
import torch

from featup_hub.training.checkpoints import (
    Metrics,
    load_checkpoint,
    restoring,
    save_checkpoint,
)


def test_metrics_can_be_read_while_a_run_goes_on(tmp_path):
    metrics = Metrics(tmp_path / "m.csv", 0)
    metrics.add({"step": 0, "loss": 1 / 3, "source": "a"})
    metrics.flush()
    assert (tmp_path / "m.csv").read_text() == "step,loss,source\n0,0.333333,a\n"
    metrics.close()


@pytest.mark.parametrize("torn", ["9", "100", "100,0.4\n101,0.4\n", "x" * 5000, ""])
def test_rows_after_the_checkpoint_are_dropped_whole_or_torn(tmp_path, torn):
    kept = "step,loss\n98,0.6\n99,0.5\n"
    (tmp_path / "m.csv").write_text(kept + torn)
    metrics = Metrics(tmp_path / "m.csv", 100)
    metrics.add({"step": 100, "loss": 0.4})
    metrics.close()
    lines = (tmp_path / "m.csv").read_text().split()
    assert lines == ["step,loss", "98,0.6", "99,0.5", "100,0.4"]


def test_metrics_that_are_missing_are_begun_anew(tmp_path):
    metrics = Metrics(tmp_path / "m.csv", 100)
    metrics.add({"step": 100, "loss": 0.4})
    metrics.close()
    assert (tmp_path / "m.csv").read_text().split() == ["step,loss", "100,0.4"]


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


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"parts": 1, "region_noise": 0.0, "photographs": "a" * 64}),
        ({"window": 1.0, "downsampler": "attention", "kernel_taps": ()}, {}),
        ({"photographs": "a" * 64}, {"photographs": "a" * 64}),
    ],
)
def test_entries_that_change_nothing_may_be_missing(tmp_path, theirs, ours):
    save_checkpoint(tmp_path / "c.pt", {"config": {"lr": 1.0, **theirs}})
    assert load_checkpoint(tmp_path / "c.pt", {"lr": 1.0, **ours})


@pytest.mark.parametrize(
    ("theirs", "ours", "change"),
    [
        ({"lr": 1.0}, {"lr": 2.0}, "lr: 1.0 there, 2.0 here"),
        ({}, {"parts": 2}, "parts: 1 there, 2 here"),
        ({"image": "a" * 64}, {"image": "b" * 64}, "image: another one"),
    ],
)
def test_another_config_is_refused_and_digests_are_not_spelt_out(tmp_path, theirs, ours, change):
    save_checkpoint(tmp_path / "c.pt", {"config": {"seed": 1, **theirs}})
    with pytest.raises(ValueError, match=rf"another config \({change}\); repeat its options"):
        load_checkpoint(tmp_path / "c.pt", {"seed": 1, **ours})


def test_a_checkpoint_with_options_of_another_version_names_the_way_on(tmp_path):
    theirs = {"lr": 1.0, "seed": 1, "window": 2.0, "kernel_taps": (3,), "downsampler": "attention"}
    save_checkpoint(tmp_path / "c.pt", {"config": theirs})
    message = r"lacks \(window: 2.0, kernel_taps: \(3,\)\); go on with the version that wrote it"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pt", {"lr": 2.0, "seed": 1})
