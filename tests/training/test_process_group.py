"""Two processes under torchrun give the same bits as one, also after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from featup_hub.training import jbu
from featup_hub.training.jbu import train
from featup_hub.training.process_group import ProcessGroup
from featup_hub.weights import metadata, read
from tests.training.conftest import SMALL, rows

PARTS = replace(SMALL, batch=4, parts=2, dropout=0.1, checkpoint_minutes=0.0)

WORKER = """
import json, os, sys
import torch
from featup_hub.training import jbu
from featup_hub.training.config import JBUTrainingConfig
from tests.training.conftest import Stem
from tests.training.test_process_group import keep_gradients

stops, photos, out, fields = sys.argv[1:]
config = JBUTrainingConfig(**{k: tuple(v) if isinstance(v, list) else v
                              for k, v in json.loads(fields).items()})
step, gradients = keep_gradients(2 if stops == "stop" else None)
jbu._Run.step = step
try:
    jbu.train(photos, out, config, backbones={"stem": Stem()}, progress=False)
except KeyboardInterrupt:
    raise SystemExit(0)
torch.save(gradients, f"{out}.{os.environ['RANK']}.pt")
"""


def keep_gradients(stop):
    """Returns a step that notes its gradients, or is interrupted at number ``stop``; and these."""
    step, gradients = jbu._Run.step, []

    def kept(run, number):
        if number == stop:
            raise KeyboardInterrupt
        row = step(run, number)
        gradients.append([p.grad.clone() for p in run.parameters if p.grad is not None])
        return row

    return kept, gradients


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_train_what_one_does(photos, stem, tmp_path, monkeypatch):
    kept, alone = keep_gradients(None)
    monkeypatch.setattr(jbu._Run, "step", kept)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes below; more threads add up in another order
    one = train(photos, tmp_path / "one", PARTS, backbones={"stem": stem}, progress=False)
    torch.set_num_threads(threads)

    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    for stops in ("stop", "go on"):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        line += [str(worker), stops, str(photos), str(tmp_path / "two"), json.dumps(asdict(PARTS))]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[:6000]

    for rank in (0, 1):
        together = torch.load(tmp_path / f"two.{rank}.pt", weights_only=True)
        assert len(together) == 2  # steps 2 and 3, after the stop
        assert all(len(gradients) > 10 for gradients in together)
        torch.testing.assert_close(together, alone[2:], rtol=1e-6, atol=1e-9)
    two = tmp_path / "two/jbu.safetensors"
    torch.testing.assert_close(read(two), read(one), rtol=1e-6, atol=1e-8)
    assert metadata(two) == metadata(one)
    assert rows(tmp_path / "two/metrics.csv") == rows(tmp_path / "one/metrics.csv")


def test_parts_are_photographs_of_the_same_batch_and_their_mean_is_the_loss(photos, stem, tmp_path):
    run = jbu._Run(
        replace(PARTS, dropout=0.0), jbu.PhotoStream(photos), {"stem": stem}, ProcessGroup()
    )
    run.restore(tmp_path / "none")
    seen = []
    differentiate = run._differentiate

    def watch(source, rgb, backbone_size, generator):
        terms = differentiate(source, rgb, backbone_size, generator)
        seen.append((rgb, terms["loss"]))
        return terms

    run._differentiate = watch
    row = run.step(3)
    whole = run.stream.batch(3, 4, (32, 32))
    assert torch.equal(torch.cat([rgb for rgb, _ in seen]), whole)
    assert row["loss"] == pytest.approx(sum(loss.item() for _, loss in seen))


@pytest.mark.parametrize(
    ("batch", "parts", "processes"), [(4, 3, 1), (4, 0, 1), (2, 4, 1), (4, 2, 3)]
)
def test_a_batch_that_does_not_divide_is_refused(
    photos, stem, tmp_path, monkeypatch, batch, parts, processes
):
    group = ProcessGroup(rank=0, size=processes)
    monkeypatch.setattr(jbu, "process_group", lambda _: nullcontext(group))
    config = replace(PARTS, batch=batch, parts=parts)
    with pytest.raises(ValueError, match=f"batch of {batch} in parts={parts} for {processes} proc"):
        train(photos, tmp_path, config, backbones={"stem": stem})
    assert list(tmp_path.iterdir()) == []
