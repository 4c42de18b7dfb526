"""Training runs that stop, resume, diverge or do not match their checkpoint."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

from featup_hub import JBUStack
from featup_hub.training import jbu
from featup_hub.training.jbu import train
from featup_hub.weights import read, write
from tests.training.small_run import SMALL, rows


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_stopped_run_goes_on_to_the_same_weights(photos, stem, tmp_path, monkeypatch, dropout):
    config = replace(SMALL, checkpoint_minutes=0, dropout=dropout)
    whole = train(photos, tmp_path / "whole", config, backbones={"stem": stem}, progress=False)

    step = jbu._Run.step

    def stop(run, number):  # fmt: skip
        if number == 2:
            raise KeyboardInterrupt
        return step(run, number)

    monkeypatch.setattr(jbu._Run, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(photos, tmp_path / "parts", config, backbones={"stem": stem}, progress=False)
    monkeypatch.setattr(jbu._Run, "step", step)
    torch.manual_seed(99)
    parts = train(photos, tmp_path / "parts", config, backbones={"stem": stem}, progress=False)

    assert rows(tmp_path / "whole/metrics.csv") == rows(tmp_path / "parts/metrics.csv")
    assert [row["step"] for row in rows(tmp_path / "parts/metrics.csv")] == ["0", "1", "2", "3"]
    for name, value in read(whole).items():
        assert torch.equal(read(parts)[name], value), name


def test_rows_written_after_the_checkpoint_are_not_kept_twice(photos, stem, tmp_path, monkeypatch):
    config = replace(SMALL, checkpoint_minutes=100)
    save = jbu.save_checkpoint
    step = jbu._Run.step

    def early(run, number):  # fmt: skip
        if number == 1:
            save(tmp_path / "checkpoint.pt", run.state(1))
        if number == 3:
            raise SystemExit  # a kill: nothing is saved
        return step(run, number)

    monkeypatch.setattr(jbu._Run, "step", early)
    with pytest.raises(SystemExit):
        train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    assert len(rows(tmp_path / "metrics.csv")) == 3
    monkeypatch.setattr(jbu._Run, "step", step)
    train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("moment", "steps"), [("gradients", 2), ("update", None), ("first gradients", None)]
)
def test_an_interruption_keeps_whole_steps_and_the_run_goes_on_to_the_same_weights(
    photos, stem, tmp_path, monkeypatch, moment, steps
):
    config = replace(SMALL, checkpoint_minutes=100)
    whole = train(photos, tmp_path / "whole", config, backbones={"stem": stem}, progress=False)
    calls = []

    def interrupted(function, at):
        def call(*arguments):
            result = function(*arguments)
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return result

        return call

    with monkeypatch.context() as patch:
        if moment == "update":  # the stages' weights are changed, their mean is not
            # Called once on the initial stages, then once a step.
            patch.setattr(jbu, "make_unit_sum", interrupted(jbu.make_unit_sum, 4))
        else:
            at = 3 if moment == "gradients" else 1
            changed = interrupted(jbu._Run._differentiate, at)
            patch.setattr(jbu._Run, "_differentiate", lambda *arguments: changed(*arguments))
        with pytest.raises(KeyboardInterrupt):
            train(photos, tmp_path / "run", config, backbones={"stem": stem}, progress=False)
    file = tmp_path / "run/checkpoint.pt"
    kept = torch.load(file, weights_only=True)["step"] if file.exists() else None
    assert kept == steps

    parts = train(photos, tmp_path / "run", config, backbones={"stem": stem}, progress=False)
    assert rows(tmp_path / "whole/metrics.csv") == rows(tmp_path / "run/metrics.csv")
    for name, value in read(whole).items():
        assert torch.equal(read(parts)[name], value), name


@pytest.mark.parametrize(("spoilt", "name"), [("loss", "loss"), ("grad", "norm of gradients")])
def test_a_run_that_diverges_stops_before_it_spoils_weights_or_checkpoint(
    photos, stem, tmp_path, monkeypatch, spoilt, name
):
    config = replace(SMALL, checkpoint_minutes=0)
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
        train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    run, before = runs[0]
    for key, value in run.stack.state_dict().items():
        assert torch.equal(value, before[key]), key
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(value.isfinite().all() for value in kept["stack"].values())
    assert not (tmp_path / "jbu.safetensors").exists()
    assert len(rows(tmp_path / "metrics.csv")) == 2


def test_weights_spoilt_by_the_last_step_are_not_kept(photos, stem, tmp_path, monkeypatch):
    step = jbu._Run.step

    def spoil(run, number):
        row = step(run, number)
        torch.nn.init.constant_(run.stack.up4.range_proj[0].bias, math.nan)
        return row

    monkeypatch.setattr(jbu._Run, "step", spoil)
    with pytest.raises(RuntimeError, match=r"a finite weight; it diverged at step 1 \(nan\)"):
        train(photos, tmp_path, replace(SMALL, steps=1), backbones={"stem": stem}, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_folder_of_another_run_is_refused(photos, stem, tmp_path):
    train(photos, tmp_path, replace(SMALL, steps=1), backbones={"stem": stem}, progress=False)
    with pytest.raises(ValueError, match=r"another config \(lr: 0.001 there, 0.5 here\); repeat"):
        train(photos, tmp_path, replace(SMALL, steps=1, lr=0.5), backbones={"stem": stem})
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"not a checkpoint of this trainer .*remove it"):
        train(photos, tmp_path, replace(SMALL, steps=1), backbones={"stem": stem})


def test_a_run_of_other_photographs_backbones_or_first_stages_is_refused(photos, stem, tmp_path):
    start = tmp_path / "start.safetensors"
    write(JBUStack().state_dict(), start)
    config = replace(SMALL, steps=1, start=str(start))
    train(photos, tmp_path / "run", config, backbones={"stem": stem}, progress=False)
    file = tmp_path / "run/checkpoint.pt"
    before = file.read_bytes()

    fewer = shutil.copytree(photos, tmp_path / "fewer")
    (fewer / "p0.png").unlink()
    with pytest.raises(ValueError, match=r"another config \(photographs: another one\)"):
        train(fewer, tmp_path / "run", config, backbones={"stem": stem}, progress=False)
    other = type(stem)(seed=1)
    with pytest.raises(ValueError, match=r"\(weights of stem: another one\)"):
        train(photos, tmp_path / "run", config, backbones={"stem": other}, progress=False)
    write(JBUStack().state_dict(), start)
    with pytest.raises(ValueError, match=r"\(weights of .*start.safetensors: another one\)"):
        train(photos, tmp_path / "run", config, backbones={"stem": stem}, progress=False)
    assert file.read_bytes() == before


def test_a_checkpoint_from_before_photographs_and_weights_were_noted_goes_on(
    photos, stem, tmp_path
):
    config = replace(SMALL, steps=1)
    train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    new = {"photographs", "weights of stem"}
    state["config"] = {k: v for k, v in state["config"].items() if k not in new}
    assert state["config"].keys() == jbu._comparable(config).keys()
    torch.save(state, tmp_path / "checkpoint.pt")
    assert train(photos, tmp_path, config, backbones={"stem": stem}, progress=False).exists()
