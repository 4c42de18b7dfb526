"""Training runs that stop, resume, diverge or do not match their checkpoint."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from featup_hub import JBUStack
from featup_hub.training import jbu
from featup_hub.weights import metadata, read, write
from tests.training.conftest import Stem, rows


def assert_equal_runs(one, other):
    assert rows(one / "metrics.csv") == rows(other / "metrics.csv")
    assert [row["step"] for row in rows(one / "metrics.csv")] == ["0", "1", "2", "3"]
    theirs = read(other / "jbu.safetensors")
    for name, value in read(one / "jbu.safetensors").items():
        assert torch.equal(theirs[name], value), name


def interrupt(monkeypatch, owner, name, at, error=KeyboardInterrupt):
    """Raises an error after the call number ``at`` of a function."""
    function, calls = getattr(owner, name), []

    def call(*arguments):
        result = function(*arguments)
        calls.append(1)
        if len(calls) == at:
            raise error
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "at", "steps", "changes"),
    [
        # Between a step and its checkpoint, which is then written.
        (jbu._Run, "state", 2, 2, {"checkpoint_minutes": 0, "dropout": 0.1}),
        (jbu._Run, "_differentiate", 1, None, {}),
        (jbu._Run, "_differentiate", 3, 2, {}),
        (torch.optim.NAdam, "step", 3, None, {}),  # the weights are changed, their mean is not
    ],
)
def test_an_interrupted_run_keeps_whole_steps_and_goes_on_to_the_same_weights(
    small, tmp_path, monkeypatch, owner, name, at, steps, changes
):
    often = {"checkpoint_minutes": 100, **changes}
    small(tmp_path / "whole", **often)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, at)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "parts", **often)
    file = tmp_path / "parts/checkpoint.pt"
    kept = torch.load(file, weights_only=True)["step"] if file.exists() else None
    assert kept == steps
    weights = tmp_path / "parts/jbu.safetensors"  # usable, if training shall not go on
    assert (metadata(weights)["steps_done"] if weights.exists() else None) == (steps and str(steps))
    torch.manual_seed(99)
    small(tmp_path / "parts", **often)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("spoilt", "name"), [("loss", "loss"), ("grad", "norm of gradients")])
def test_a_run_that_diverges_stops_before_it_spoils_weights_or_checkpoint(
    small, tmp_path, monkeypatch, spoilt, name
):
    differentiate, parts, runs = jbu._Run._differentiate, [], []

    def spoil(run, *drawn):
        terms = differentiate(run, *drawn)
        parts.append(terms)
        if len(parts) == 3:
            runs.append((run, {k: v.clone() for k, v in run.stack.state_dict().items()}))
            bad = terms["loss"] if spoilt == "loss" else run.stack.up4.fixup_proj[3].weight.grad
            bad.fill_(math.nan)
        return terms

    monkeypatch.setattr(jbu._Run, "_differentiate", spoil)
    with pytest.raises(RuntimeError, match=f"finite {name}; it diverged at step 3 .nan.; lower"):
        small(tmp_path, checkpoint_minutes=0)
    run, before = runs[0]
    for key, value in run.stack.state_dict().items():
        assert torch.equal(value, before[key]), key
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == len(rows(tmp_path / "metrics.csv")) == 2
    assert all(value.isfinite().all() for value in kept["stack"].values())
    assert not (tmp_path / "jbu.safetensors").exists()


def test_weights_spoilt_by_the_last_step_are_not_kept(small, tmp_path, monkeypatch):
    step = jbu._Run.step

    def spoil(run, number):
        row = step(run, number)
        torch.nn.init.constant_(run.stack.up4.range_proj[0].bias, math.nan)
        return row

    monkeypatch.setattr(jbu._Run, "step", spoil)
    with pytest.raises(RuntimeError, match=r"a finite weight; it diverged at step 1 \(nan\)"):
        small(tmp_path, steps=1)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(small, photos, tmp_path):
    start, file = tmp_path / "start.safetensors", tmp_path / "run/checkpoint.pt"
    write(JBUStack().state_dict(), start)
    small(tmp_path / "run", steps=1, start=str(start))
    before = file.read_bytes()
    fewer = shutil.copytree(photos, tmp_path / "fewer")
    (fewer / "p0.png").unlink()
    for changes, message in (
        ({"lr": 0.5}, r"another config \(lr: 0.001 there, 0.5 here\); repeat"),
        ({"photos": fewer}, r"another config \(photographs: another one\)"),
        ({"stem": Stem(seed=1)}, r"\(weights of stem: another one\)"),
    ):
        with pytest.raises(ValueError, match=message):
            small(tmp_path / "run", **{"steps": 1, "start": str(start), **changes})
    write(JBUStack().state_dict(), start)
    with pytest.raises(ValueError, match=r"\(weights of .*start.safetensors: another one\)"):
        small(tmp_path / "run", steps=1, start=str(start))
    assert file.read_bytes() == before
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"not a checkpoint of this trainer .*remove it"):
        small(tmp_path / "run", steps=1, start=str(start))
