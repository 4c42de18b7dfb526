"""Fits an implicit upsampler to one image by multi-view consistency.

The backbone looks at jittered views of the image once, in batches, and only principal components
of what it sees are kept. Then a coordinate network learns features that explain all views: they
are told at random points of every cell of a few views, averaged by a learned model of the
backbone, and compared. Views that are never fitted decide when to stop, and which weights stay.

A step costs batch · h · w · taps² points; the whole image, as upstream renders it, H · W and an
interpolation of K channels for every view. Four taps stand for a patch of sixteen pixels as well
as all 256 would, on average, because they are drawn anew in every step.

Everything random in step n follows from the seed and n, so a fit that was stopped goes on exactly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3.1 and 3.2.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.training.downsamplers import AttentionDownsampler, SimpleDownsampler
from featup_hub.training.images import seeded
from featup_hub.training.implicit_config import PRESETS, ImplicitConfig
from featup_hub.training.implicit_views import look, points_of
from featup_hub.training.losses import (
    ScaleNet,
    blur_residual,
    magnitude_tv,
    mean_magnitude,
    reconstruction_loss,
)
from featup_hub.training.records import Progress, load_checkpoint, save_checkpoint
from featup_hub.training.views import Jitter, apply_jitter
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack
from featup_hub.upsamplers.implicit import pixel_centres

__all__ = ["PRESETS", "ImplicitConfig", "fit"]


def fit(
    image: Tensor,
    backbone: Backbone,
    config: ImplicitConfig = PRESETS["fast"],
    *,
    start: JBUStack | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> ImplicitUpsampler:
    """Fits the features of one image, to be asked for at any size.

    Args:
        image: Normalised RGB of any size, (1, 3, H, W); its device is where all is computed.
        backbone: Whose features; on the image's device.
        config: What to do; ``PRESETS["upstream"]`` repeats upstream's recipe.
        start: Stages whose features are the base, in place of ``config.base``.
        checkpoint: File to keep the state of the fit in, and to go on from where it exists.
        progress: Whether to show progress on the standard error stream.
        **options: Fields of :class:`ImplicitConfig` to set differently.

    Returns:
        The upsampler, in evaluation mode; its ``scores`` tell ``held_out_error``, the share of
        the variation of views never fitted that it does not explain, ``explained_variance``, the
        share that the principal components hold, and ``steps`` taken.

    Raises:
        ValueError: If ``image`` is not (1, 3, H, W), or ``checkpoint`` is of another fit.
        TypeError: If there is no such option.

    Example:
        >>> from featup_hub import ModuleBackbone
        >>> cnn = ModuleBackbone(nn.Conv2d(3, 8, 8, stride=8), feat_dim=8, patch_size=8)
        >>> upsampler = fit(torch.rand(1, 3, 32, 40), cnn, steps=2, views=4, components=8)
        >>> upsampler.features((64, 80)).shape
        torch.Size([1, 8, 64, 80])
    """
    if image.dim() != 4 or image.shape[:2] != (1, 3):
        raise ValueError(
            f"fit takes one normalised RGB image, (1, 3, H, W); got {tuple(image.shape)}; "
            "fit images one by one"
        )
    if options:
        config = replace(config, **options)
    began = time.monotonic()
    run = _Run(image, backbone, config, start)
    path = None if checkpoint is None else Path(checkpoint)
    first = run.restore(path)
    done = first
    with Progress(config.steps, first, progress) as bar:
        for step in range(first, config.steps):
            passed = (time.monotonic() - began) / config.seconds if config.seconds else 0.0
            if run.finished or passed >= 1:
                break
            loss = run.step(step, passed)
            done = step + 1
            if done % config.check_every == 0:
                run.check(done)
                if path is not None:
                    save_checkpoint(path, run.state(done))
            bar.advance(f"loss {loss:.4f} held-out error {run.error:.4f}")
    return run.result(done)


class _Run:
    """The state of a fit, and how one step changes it."""

    def __init__(
        self, image: Tensor, backbone: Backbone, config: ImplicitConfig, start: JBUStack | None
    ) -> None:
        self.config, self.image = config, image
        self.digest = _digest(backbone.state_dict())
        self.start = "" if start is None else _digest(start.state_dict())
        self.pca, self.views, self.held_out = look(image, backbone, config)
        dim = len(self.pca.components)
        base = self.views.features[:1].float() if config.base == "source" else None
        if start is not None:
            with torch.no_grad():
                base = start.to(image.device).eval()(self.views.features[:1].float(), image)
        # Modules draw their first weights from the global generator, which is put back after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = ImplicitUpsampler(
                image.cpu(),
                self.pca.mean,
                self.pca.directions,
                frequencies=config.frequencies,
                log_range=(config.lowest, config.highest),
                hidden=config.hidden,
                dropout=config.dropout,
                base=base,
                backbone=str(getattr(backbone, "name", type(backbone).__name__)),
                backbone_digest=self.digest,
            )
            stride = config.taps or backbone.patch_size
            self.downsampler: AttentionDownsampler | SimpleDownsampler = (
                AttentionDownsampler(dim, stride)
                if config.downsampler == "attention"
                else SimpleDownsampler(stride)
            )
            self.scale = ScaleNet(dim)
        if base is not None:  # at first, the base alone
            for parameter in self.model.layers[-1].parameters():
                nn.init.zeros_(parameter)
        self.learned = nn.ModuleList([self.model, self.downsampler, self.scale]).to(image.device)
        self.optimizer = torch.optim.NAdam(self.learned.parameters(), lr=config.lr)
        self.error, self.best_step, self.checked = math.inf, 0, 0
        self.best = self._network()

    @property
    def finished(self) -> bool:
        """Whether the held-out views have stopped to gain."""
        looks = (self.checked - self.best_step) // self.config.check_every
        return 0 < self.config.patience <= looks

    def step(self, step: int, passed: float) -> float:
        """Takes one optimiser step, with ``passed`` of the time gone; returns the loss."""
        config, generator = self.config, seeded(self.config.seed, 2, step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(max(step / config.steps, passed))
        chosen = torch.randint(len(self.views.jitters), (config.batch,), generator=generator)
        jitters = [self.views.jitters[n] for n in chosen.tolist()]
        observed = self.views.features[chosen.to(self.image.device)].float()
        self.learned.train()
        devices = [self.image.device] if self.image.is_cuda else []
        with torch.random.fork_rng(devices=devices, enabled=config.dropout > 0):
            if config.dropout > 0:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            predicted, area = self._render(jitters, generator)
        scale = self.scale(observed) if config.uncertainty else None
        loss = reconstruction_loss(predicted, observed, scale)
        for weight, term in (
            (config.magnitude_weight, mean_magnitude),
            (config.tv_weight, magnitude_tv),
            (config.blur_weight, blur_residual),
        ):
            if weight:
                loss = loss + weight * term(area)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Looks at the held-out views, and keeps the weights if they are the best so far."""
        self.learned.eval()
        residual = torch.zeros(())
        for part in self.held_out.split(self.config.batch):
            predicted = self._predict(part.jitters, None)
            residual = residual + (predicted - part.features.float()).square().sum().cpu()
        error = float(residual / self.held_out.features.float().square().sum().cpu())
        self.checked = step
        if error < self.error:
            self.error, self.best_step, self.best = error, step, self._network()

    def result(self, done: int) -> ImplicitUpsampler:
        """Returns the best network seen in the steps ``done``."""
        if done != self.checked or not self.best_step:
            self.check(done)
        self.model.load_state_dict(self.best)
        self.model.scores = {
            "held_out_error": self.error,
            "explained_variance": self.pca.explained,
            "steps": float(self.best_step),
        }
        return self.model.eval().requires_grad_(False)

    def state(self, step: int) -> dict[str, object]:
        """Returns all that a stopped fit needs to go on after ``step`` steps."""
        return {
            "step": step,
            "config": self._identity(),
            "learned": self.learned.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "error": self.error,
        }

    def restore(self, path: Path | None) -> int:
        """Takes up a checkpoint where there is one; returns the first step to take."""
        if path is None or not path.exists():
            return 0
        state = load_checkpoint(path, self._identity())
        self.learned.load_state_dict(state["learned"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_step, self.error = state["best"], state["best_step"], state["error"]
        self.checked = int(state["step"])
        return self.checked

    def _identity(self) -> dict[str, object]:
        image = _digest({"image": self.image})
        seen = {"image": image, "backbone": self.digest, "start": self.start}
        return {**asdict(self.config), **seen}

    def _network(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _render(
        self, jitters: Sequence[Jitter], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns what the backbone should see of views, and features of neighbouring pixels."""
        height, width = self.model.image_size
        centres = pixel_centres(height, width, self.image.device)
        if not self.config.taps:
            whole = self._tell(centres[None])
            seen = apply_jitter(whole.expand(len(jitters), -1, -1, -1), jitters)
            return self._downsample(seen), whole
        side = [min(self.config.patch, n) for n in (height, width)]
        top, left = (
            int(torch.randint(n - s + 1, (), generator=generator))
            for n, s in zip((height, width), side, strict=True)
        )
        area = centres[top : top + side[0], left : left + side[1]]
        return self._predict(jitters, generator), self._tell(area[None])

    def _predict(self, jitters: Sequence[Jitter], generator: torch.Generator | None) -> Tensor:
        """Returns what the backbone should see of views, (V, K, h, w)."""
        h, w = self.views.features.shape[-2:]
        taps = self.config.taps or self.downsampler.stride
        positions = points_of(jitters, (h * taps, w * taps), generator).to(self.image)
        return self._downsample(self._tell(positions))

    def _tell(self, position: Tensor) -> Tensor:
        """Runs the network at fractions of the image, (V, H, W, 2) -> (V, K, H, W)."""
        kind, low = self.image.device.type, self.config.precision == "bfloat16"
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            told = self.model.coordinates(position.flatten(0, 2))
        return told.float().unflatten(0, position.shape[:3]).permute(0, 3, 1, 2)

    def _downsample(self, features: Tensor) -> Tensor:
        h, w = self.views.features.shape[-2:]
        return self.downsampler(features, (h, w))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of tensors, in hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
