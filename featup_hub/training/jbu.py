"""Trains a stack of JBU stages by multi-view consistency on photographs without labels.

A step minimises :func:`featup_hub.training.objective.consistency_loss` on one batch.

Random numbers of step n depend only on the seed and n, so a resumed run takes the same steps as an
uninterrupted one (on a GPU with ``torch.use_deterministic_algorithms``). A batch may be computed in
parts: one process computes them in turn, several processes (``torchrun``) share them, and both give
the same weights.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3 and 4.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featup_hub.backbones import Backbone
from featup_hub.files import sha256_of_tensors
from featup_hub.loading import nearest_multiple
from featup_hub.training.checkpoints import (
    add_metrics,
    load_checkpoint,
    open_metrics,
    save_checkpoint,
)
from featup_hub.training.config import JBUTrainingConfig
from featup_hub.training.objective import consistency_loss
from featup_hub.training.photos import PhotoStream
from featup_hub.training.process_group import ProcessGroup, process_group
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import TrainingSource, open_backbones
from featup_hub.upsamplers import JBUStack
from featup_hub.weights import load as load_weights
from featup_hub.weights import load_into, write

__all__ = ["JBUTrainingConfig", "train"]

SCALE_PHOTOS = 32  # on which the scale of features is measured
WEIGHTS = "jbu.safetensors"


def train(
    photos: str | Path,
    out: str | Path,
    config: JBUTrainingConfig,
    *,
    backbones: Mapping[str, Backbone] | None = None,
    progress: bool = True,
) -> Path:
    """Trains stages on a folder of photographs, or resumes the run in ``out``.

    A checkpoint is written every few minutes, at the end, and on a KeyboardInterrupt. The weights
    are written at the end, and as they are on a KeyboardInterrupt.

    Args:
        photos: Folder of photographs, searched with its subfolders.
        out: Folder for ``checkpoint.pt``, ``metrics.csv`` and ``jbu.safetensors``.
        config: The settings.
        backbones: Backbones by the names in ``config.backbones``; default: load them by name.
        progress: Whether to show progress on the standard error stream.

    Returns:
        The weights file: stages for any backbone, with the config in its metadata.

    Raises:
        FileNotFoundError: If the folder of photographs does not exist.
        ValueError: If the folder has no readable photograph; if ``out`` has a run with another
            config, other photographs or other backbone weights; if ``parts`` does not divide the
            batch, or the number of processes does not divide ``parts``.
        TypeError: If one of ``backbones`` is not a backbone.
        RuntimeError: If the loss or its gradient is not finite; the last checkpoint is kept.
    """
    with process_group(config.device) as group:
        if config.parts < 1 or config.batch % config.parts or config.parts % group.size:
            raise ValueError(
                "the batch must divide into its parts, and these among the processes; got a batch "
                f"of {config.batch} in parts={config.parts} for {group.size} process(es); "
                "choose parts as a multiple of the processes, and batch as one of parts"
            )
        stream = PhotoStream(photos, seed=config.seed, min_scale=config.min_scale)
        run = _Run(config, stream, open_backbones(config.backbones, backbones), group)
        _train(run, Path(out), progress=progress and group.is_main)
        if group.is_main:
            run.export(Path(out) / WEIGHTS)
        group.barrier()
    return Path(out) / WEIGHTS


def _train(run: _Run, out: Path, *, progress: bool) -> None:
    """Takes the remaining steps; the main process writes checkpoints and metrics."""
    config, is_main, checkpoint = run.config, run.group.is_main, out / "checkpoint.pt"
    out.mkdir(parents=True, exist_ok=True)
    # All processes have read before one writes: the first step waits for every process.
    first = run.restore(checkpoint)
    saved = time.monotonic()
    with (
        open_metrics(out / "metrics.csv", first) if is_main else nullcontext() as metrics,
        tqdm(total=config.steps, initial=first, unit="step", disable=not progress) as bar,
    ):
        try:
            for step in range(first, config.steps):
                row = run.step(step)
                if metrics:
                    add_metrics(metrics, {"step": step, **row})
                bar.set_postfix_str(f"{row['source']} loss {row['loss']:.4f}", refresh=False)
                bar.update()
                last = step + 1 == config.steps
                if is_main and (last or time.monotonic() - saved > 60 * config.checkpoint_minutes):
                    save_checkpoint(checkpoint, run.state())
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if is_main and run.done:
                save_checkpoint(checkpoint, run.state())
                run.export(out / WEIGHTS)
            raise


def _check_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise RuntimeError(
            f"training needs a finite {name}; it diverged at step {step + 1} ({value}); "
            "lower lr, and start again in another folder"
        )


def _fitting(side: float, patch: int) -> int:
    """Returns the multiple of the patch size nearest to a side, at least two patches."""
    return max(nearest_multiple(side, patch), 2 * patch)


class _Run:
    """The state of a training run, and how one step changes it."""

    def __init__(
        self,
        config: JBUTrainingConfig,
        stream: PhotoStream,
        backbones: Mapping[str, Backbone],
        group: ProcessGroup,
    ) -> None:
        self.config, self.stream, self.group = config, stream, group
        start = load_weights(config.start) if config.start else {}
        # Modules draw initial weights from the global generator; its state is restored.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.stack = JBUStack(
                dropout=config.dropout,
                joint_first=any(name.startswith("first.") for name in start),
                unit_sum=config.unit_sum,
            )
            self.sources = {
                name: TrainingSource(backbone.to(config.device), downsampler=config.downsampler)
                for name, backbone in backbones.items()
            }
        if config.start:
            load_into(self.stack, start, origin=config.start)
        weights = {config.start: start} if start else {}
        weights |= {name: backbone.state_dict() for name, backbone in backbones.items()}
        # What must be equal in the run of a checkpoint. Equal configs may name different files.
        digests = {f"weights of {name}": sha256_of_tensors(each) for name, each in weights.items()}
        self.comparable = {**asdict(config), "photographs": stream.digest, **digests}
        del self.comparable["checkpoint_minutes"], self.comparable["device"]
        self.models = nn.ModuleList(self.sources.values())
        self.stack.train().to(config.device)
        self.models.train().to(config.device)
        self.mean = {name: p.detach().clone() for name, p in self.stack.state_dict().items()}
        self.parameters = [*self.stack.parameters(), *self.models.parameters()]
        self.optimizer = torch.optim.NAdam(self.parameters, lr=config.lr)
        self.done: int | None = 0  # complete steps; None while the weights are inconsistent

    def step(self, step: int) -> dict[str, float | str]:
        """Takes one optimiser step and returns its metrics."""
        config, began = self.config, time.monotonic()
        generator = seeded(config.seed, 2, step)
        name = config.backbones[int(torch.randint(len(config.backbones), (), generator=generator))]
        source = self.sources[name]
        size, backbone_size = self._sizes(source.patch_size, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for part in range(self.group.rank, config.parts, self.group.size):
            if config.parts > 1:
                generator = seeded(config.seed, 2, step, part)
            count, number = config.batch // config.parts, step * config.parts + part
            rgb = self.stream.batch(number, count, size).to(config.device)
            for term, value in self._differentiate(source, rgb, backbone_size, generator).items():
                terms[term] = terms[term] + value if term in terms else value
        # All processes drew the same source and size, so the same parameters have gradients.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.group.all_reduce([*gradients, *terms.values()])
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
        row = {term: value.item() for term, value in terms.items()} | {"grad_norm": norm}
        # Before the optimiser step: it would put bad weights into the next checkpoint.
        _check_finite(row["loss"], "loss", step)
        _check_finite(norm, "norm of gradients", step)
        self.done = None
        self.optimizer.step()
        state = self.stack.state_dict()
        # With unit_sum, what is saved differs from the parameters. A resumed run begins with it.
        self.stack.load_state_dict(state)
        for key, value in state.items():
            # The decay grows with the steps, so that an early mean forgets the initial weights.
            self.mean[key].lerp_(value, 1 - min(config.ema, (1 + step) / (10 + step)))
        self.done = step + 1
        return {
            "source": name.partition("=")[0],
            "size": f"{size[0]}x{size[1]}",
            **row,
            "lr": config.learning_rate(step),
            "seconds": round(time.monotonic() - began, 3),
        }

    def _differentiate(
        self,
        source: TrainingSource,
        rgb: Tensor,
        backbone_size: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Adds the gradients of one part of the batch; returns its share of each term."""
        config = self.config
        with torch.random.fork_rng(devices=[], enabled=config.dropout > 0):
            if config.dropout > 0:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            terms = consistency_loss(self.stack, source, rgb, backbone_size, config, generator)
        (terms["loss"] / config.parts).backward()
        return {name: value.detach() / config.parts for name, value in terms.items()}

    def _sizes(
        self, patch: int, generator: torch.Generator
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Draws the size of the crops and the size to which they are resized for the backbone."""
        config = self.config
        shape, zoom = (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1).tolist()
        sides = [config.image_size * config.max_aspect ** (s * shape / 2) for s in (1, -1)]
        height, width = (_fitting(side, patch) for side in sides)
        factor = config.max_stride**zoom
        return (height, width), (_fitting(height * factor, patch), _fitting(width * factor, patch))

    def state(self) -> dict[str, object]:
        """Returns the state after the complete steps."""
        # The loss was computed before the last step, so the weights may be bad.
        largest = torch.stack([p.detach().abs().max() for p in self.parameters]).max()
        assert self.done is not None
        _check_finite(float(largest), "weight", self.done - 1)
        return {
            "step": self.done,
            "config": self.comparable,
            "stack": self.stack.state_dict(),
            "mean": self.mean,
            "sources": self.models.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, path: Path) -> int:
        """Loads the checkpoint, if there is one; else measures the scale of backbones' features.

        Returns the first step to take.
        """
        if not path.exists():
            for source in self.sources.values():
                side = _fitting(self.config.image_size, source.patch_size)
                crops = (self.stream.sample(n, (side, side)) for n in range(SCALE_PHOTOS))
                source.measure(crop[None].to(self.config.device) for crop in crops)
            return 0
        load_checkpoint(path, self.comparable, self._load)
        return self.done or 0

    def _load(self, state: Mapping[str, Any]) -> None:
        self.stack.load_state_dict(state["stack"])
        self.models.load_state_dict(state["sources"])
        self.optimizer.load_state_dict(state["optimizer"])
        mean = state["mean"].items()
        self.mean = {name: value.to(self.config.device) for name, value in mean}
        self.done = int(state["step"])

    def export(self, path: Path) -> None:
        """Writes the stages (the running mean of the weights) for any backbone."""
        joint = ", joint_first=True" if self.stack.joint_first else ""
        notes = {
            "architecture": f"JBUStack(feat_dim=None{joint})",
            "config": json.dumps(self.config.without_folders()),
            "seed": str(self.config.seed),
            "steps_done": str(self.done),
            "photos": str(len(self.stream.paths)),
        }
        write(self.mean if self.config.ema else self.stack.state_dict(), path, metadata=notes)
