"""Trains a stack of JBU stages by multi-view consistency on photographs without labels.

Every step: photographs, their features and the features of a few jittered views from one frozen
backbone; a random projection to a few channels (the stack is linear in the source and treats
channels alike, so the source is projected, not the result); the upsampled features are jittered as
the views were, downsampled by a learned model of the backbone, and compared.

Everything random in step n follows from the seed and n, so a run that was stopped goes on exactly
(on a GPU under ``torch.use_deterministic_algorithms``).
A batch may be computed in parts, which follow from the part's number, too: one process takes them
in turn, several (``torchrun``) share them, and both end in the same weights.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3 and 4.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.files import sha256_of_tensors
from featup_hub.registry import JBU_UNIVERSAL
from featup_hub.training.config import UPSTREAM_TAPS, JBUTrainingConfig
from featup_hub.training.consistency import consistency_loss
from featup_hub.training.images import PhotoStream, seeded
from featup_hub.training.processes import Team, joined
from featup_hub.training.projection import make_unit_sum
from featup_hub.training.records import (
    Metrics,
    Progress,
    load_checkpoint,
    restoring,
    save_checkpoint,
)
from featup_hub.training.sources import TrainingSource, open_backbones
from featup_hub.upsamplers import JBUStack
from featup_hub.weights import load as load_weights
from featup_hub.weights import load_into, write

__all__ = ["UPSTREAM_TAPS", "JBUTrainingConfig", "train"]


def train(
    photos: str | Path,
    out: str | Path,
    config: JBUTrainingConfig,
    *,
    backbones: Mapping[str, Backbone] | None = None,
    progress: bool = True,
) -> Path:
    """Trains stages on a folder of photographs, going on where an earlier call was stopped.

    A checkpoint is written every few minutes, at the end, and on a KeyboardInterrupt.

    Args:
        photos: Folder of photographs, searched with its subfolders.
        out: Folder for ``checkpoint.pt``, ``metrics.csv`` and ``jbu.safetensors``.
        config: What to do.
        backbones: Backbones by the names in ``config.backbones``; default: they are loaded.
        progress: Whether to show progress on the standard error stream.

    Returns:
        The weights file: stages for any backbone, with the config in its metadata.

    Raises:
        FileNotFoundError: If the folder of photographs does not exist.
        ValueError: If it holds none that can be read, ``out`` holds a run of another config, of
            other photographs or of backbones with other weights, or the batch cannot be divided
            into its parts or these among the processes.
        RuntimeError: If the loss or its gradient is no longer a finite number; the last checkpoint
            stays.
    """
    with joined(config.device) as team:
        _check_parts(config, team)
        stream = PhotoStream(photos, seed=config.seed, min_scale=config.min_scale)
        run = _Run(config, stream, open_backbones(config.backbones, backbones), team)
        _train(run, Path(out), progress=progress and team.leads)
        if team.leads:
            run.export(Path(out) / "jbu.safetensors", photos=len(stream.paths))
        team.wait()
    return Path(out) / "jbu.safetensors"


def _train(run: _Run, out: Path, *, progress: bool) -> None:
    """Takes the steps that are left; the leading process keeps record of them."""
    config, leads = run.config, run.team.leads
    out.mkdir(parents=True, exist_ok=True)
    # Nobody writes before all have read: the first step needs every process.
    kept = first = run.restore(out / "checkpoint.pt")
    saved = time.monotonic()
    with (
        Metrics(out / "metrics.csv" if leads else Path(os.devnull), first) as metrics,
        Progress(config.steps, first, progress) as bar,
    ):
        try:
            for step in range(first, config.steps):
                row = run.step(step)
                metrics.add({"step": step, **row})
                bar.advance(f"{row['source']} loss {row['loss']:.4f}")
                last = step + 1 == config.steps
                if leads and (last or time.monotonic() - saved > 60 * config.checkpoint_minutes):
                    metrics.flush()
                    save_checkpoint(out / "checkpoint.pt", run.state(step + 1))
                    kept, saved = step + 1, time.monotonic()
        except KeyboardInterrupt:
            # Steps take long, so all whole ones are kept; half of one would spoil them.
            if leads and run.done is not None and run.done > kept:
                metrics.flush()
                save_checkpoint(out / "checkpoint.pt", run.state(run.done))
            raise


def _check_parts(config: JBUTrainingConfig, team: Team) -> None:
    if config.parts < 1 or config.batch % config.parts or config.parts % team.count:
        raise ValueError(
            "the batch must divide into its parts, and these among the processes; got a batch of "
            f"{config.batch} in parts={config.parts} for {team.count} process(es); "
            "choose parts as a multiple of the processes, and batch as one of parts"
        )


def _check_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise RuntimeError(
            f"training needs a finite {name}; it diverged at step {step + 1} ({value}); "
            "lower lr, and start again in another folder"
        )


class _Run:
    """The state of a training run, and how one step changes it."""

    def __init__(
        self,
        config: JBUTrainingConfig,
        stream: PhotoStream,
        backbones: Mapping[str, Backbone],
        team: Team,
    ) -> None:
        self.config, self.stream, self.names = config, stream, list(backbones)
        self.team = team
        # Modules draw their first weights from the global generator, which is put back after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            start = load_weights(JBU_UNIVERSAL, path=config.start) if config.start else {}
            joint = any(name.startswith("first.") for name in start)
            self.stack = JBUStack(dropout=config.dropout, joint_first=joint)
            self.sources = nn.ModuleDict()
            for index, backbone in enumerate(backbones.values()):
                self.sources[str(index)] = TrainingSource(
                    backbone.to(config.device), downsampler=config.downsampler, window=config.window
                )
        if config.start:
            load_into(self.stack, start, origin=config.start)
        if config.unit_sum:
            make_unit_sum(self.stack)
        # Two runs of one config may differ in what its names stand for.
        self.seen = {"photographs": stream.digest}
        if config.start:
            self.seen[f"weights of {config.start}"] = sha256_of_tensors(start)
        for name, backbone in backbones.items():
            self.seen[f"weights of {name}"] = sha256_of_tensors(backbone.state_dict())
        self.stack.train().to(config.device)
        self.sources.train().to(config.device)
        self.mean = {name: p.detach().clone() for name, p in self.stack.state_dict().items()}
        self.parameters = [*self.stack.parameters(), *self.sources.parameters()]
        self.optimizer = torch.optim.NAdam(self.parameters, lr=config.lr)
        self.done: int | None = 0  # whole steps taken; None while weights are between two

    def step(self, step: int) -> dict[str, float | str]:
        """Takes one optimiser step and returns its metrics."""
        config, began = self.config, time.monotonic()
        generator = seeded(config.seed, 2, step)
        drawn = int(torch.randint(len(config.backbones), (), generator=generator))
        source = self.sources[str(self.names.index(config.backbones[drawn]))]
        assert isinstance(source, TrainingSource)
        size, looked_at = self._sizes(source.patch_size, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for part in range(self.team.rank, config.parts, self.team.count):
            if config.parts > 1:
                generator = seeded(config.seed, 2, step, part)
            count, number = config.batch // config.parts, step * config.parts + part
            rgb = self.stream.batch(number, count, size).to(config.device)
            for name, value in self._differentiate(source, rgb, looked_at, generator).items():
                terms[name] = terms[name] + value if name in terms else value
        # All processes drew one source and size, so the same parameters have a gradient in all.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.team.add([*gradients, *terms.values()])
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
        row = {name: value.item() for name, value in terms.items()} | {"grad_norm": norm}
        # Before the step, which would spoil the weights that the next checkpoint keeps.
        _check_finite(row["loss"], "loss", step)
        _check_finite(norm, "norm of gradients", step)
        self.done = None
        self.optimizer.step()
        if config.unit_sum:
            make_unit_sum(self.stack)
        for name, value in self.stack.state_dict().items():
            # The mean of few steps must not remember the start: its decay grows with them.
            self.mean[name].lerp_(value, 1 - min(config.ema, (1 + step) / (10 + step)))
        self.done = step + 1
        return {
            "source": config.backbones[drawn].partition("=")[0],
            "size": f"{size[0]}x{size[1]}",
            **row,
            "lr": config.learning_rate(step),
            "seconds": round(time.monotonic() - began, 3),
        }

    def _differentiate(
        self,
        source: TrainingSource,
        rgb: Tensor,
        looked_at: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Adds a part's share to the gradients, and returns its share of every term."""
        config = self.config
        with torch.random.fork_rng(devices=[], enabled=config.dropout > 0):
            if config.dropout > 0:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            terms = consistency_loss(self.stack, source, rgb, looked_at, config, generator)
        (terms["loss"] / config.parts).backward()
        return {name: value.detach() / config.parts for name, value in terms.items()}

    def _sizes(
        self, patch: int, generator: torch.Generator
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Draws the crops' size and the size in which the backbone looks at them."""
        config = self.config
        shape, zoom = (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1).tolist()
        sides = [config.image_size * config.max_aspect ** (s * shape / 2) for s in (1, -1)]
        height, width = (max(round(side / patch), 2) * patch for side in sides)
        factor = config.max_stride**zoom
        looked_at = [max(round(side * factor / patch), 2) * patch for side in (height, width)]
        return (height, width), (looked_at[0], looked_at[1])

    def state(self, step: int) -> dict[str, object]:
        """Returns all that a stopped run needs to go on after ``step`` steps."""
        # The step just taken may have spoilt what the loss before it does not tell.
        largest = torch.stack([p.detach().abs().max() for p in self.parameters]).max()
        _check_finite(float(largest), "weight", step - 1)
        return {
            "step": step,
            "config": {**_comparable(self.config), **self.seen},
            "stack": self.stack.state_dict(),
            "mean": self.mean,
            "sources": self.sources.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, path: Path) -> int:
        """Takes up a checkpoint where there is one; returns the first step to take."""
        if not path.exists():
            self._measure()
            return 0
        state = load_checkpoint(path, _comparable(self.config), seen=self.seen)
        with restoring(path):
            self.stack.load_state_dict(state["stack"])
            self.sources.load_state_dict(state["sources"])
            self.optimizer.load_state_dict(state["optimizer"])
            mean = state["mean"].items()
            self.mean = {name: value.to(self.config.device) for name, value in mean}
            self.done = step = int(state["step"])
            return step

    def _measure(self, photos: int = 32) -> None:
        """Measures the scale of every backbone's features on the first photographs."""
        side = self.config.image_size
        for source in self.sources.values():
            assert isinstance(source, TrainingSource)
            even = max(round(side / source.patch_size), 2) * source.patch_size
            source.measure(
                self.stream.sample(n, (even, even))[None].to(self.config.device)
                for n in range(photos)
            )

    def export(self, path: Path, *, photos: int) -> None:
        """Writes the stages, averaged over the last steps, for any backbone."""
        stages = self.mean if self.config.ema else self.stack.state_dict()
        config = asdict(self.config)
        # Files are named, not located: the weights travel, the folders do not.
        config["backbones"] = [_without_folder(name) for name in self.config.backbones]
        config["start"] = _without_folder(self.config.start)
        joint = ", joint_first=True" if self.stack.joint_first else ""
        notes = {
            "architecture": f"JBUStack(feat_dim=None{joint})",
            "config": json.dumps(config),
            "seed": str(self.config.seed),
            "photos": str(photos),
        }
        write(stages, path, metadata=notes)


def _comparable(config: JBUTrainingConfig) -> dict[str, object]:
    """Returns what a checkpoint must agree in: everything but where and how often it is kept."""
    fields = asdict(config)
    for name, absent in (("parts", 1), ("region_noise", 0)):
        if fields[name] == absent:  # checkpoints from before there was such a field lack it
            del fields[name]
    return {k: v for k, v in fields.items() if k not in {"checkpoint_minutes", "device"}}


def _without_folder(name: str) -> str:
    """Shortens ``FILE`` and ``TIMM_NAME=FILE`` to the file's own name."""
    before, equals, file = name.rpartition("=")
    return before + equals + Path(file).name
