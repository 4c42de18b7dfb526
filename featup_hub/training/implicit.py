"""Fits an implicit upsampler to one image by multi-view consistency.

The backbone looks at jittered views of the image once, in batches, and only principal components
of what it sees are kept. Then a coordinate network learns features that explain all views: they
are told at random points of every cell of a few views, averaged by a learned model of the
backbone, and compared. Views that are never fitted decide when to stop, and which weights stay.

A step costs batch · h · w · taps² points, which lie at random in taps² parts of each cell and are
drawn anew in every step; the whole image, as upstream renders it, costs H · W points and an
interpolation of K channels for every view.

What does not move with the image, such as the pattern of a transformer's positions, no one map
can explain in all views, and the fit averages it out. ``base="none"`` has nothing else in it and
denoises; ``base="source"`` begins with what the backbone made of the image itself, pattern
included, and corrects it, which takes fewer steps.

Everything random in step n follows from the seed and n, so a fit that was stopped goes on exactly
(on a GPU under ``torch.use_deterministic_algorithms(True)``).

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3.1 and 3.2.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.files import sha256_of_tensors
from featup_hub.training.checkpoints import (
    Progress,
    load_checkpoint,
    restoring,
    save_checkpoint,
)
from featup_hub.training.implicit_config import PRESETS, ImplicitConfig
from featup_hub.training.implicit_objective import Objective, Sample, draw, seeded_modules
from featup_hub.training.implicit_views import look
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack

__all__ = ["PRESETS", "ImplicitConfig", "Run", "fit"]


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
        TypeError: If ``image`` is not float32, or there is no such option.
        RuntimeError: If the loss or the held-out error is no longer a finite number.

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
            "several at once are for fit_batch"
        )
    if options:
        config = replace(config, **options)
    began = time.monotonic()
    run = Run(image, backbone, config, start)
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
            # Until the first look at the held-out views there is no error to tell.
            held_out = f" held-out error {run.error:.4f}" if run.checked else ""
            bar.advance(f"loss {loss:.4f}{held_out}")
    return run.result(done)


class Run:
    """The state of a fit, and how one step changes it.

    Args:
        image: Normalised RGB, (1, 3, H, W).
        backbone: Whose features.
        config: What to do.
        start: Stages whose features are the base.

    Raises:
        TypeError: If ``image`` is not float32.
    """

    def __init__(
        self, image: Tensor, backbone: Backbone, config: ImplicitConfig, start: JBUStack | None
    ) -> None:
        if image.dtype != torch.float32:
            raise TypeError(
                f"a fit needs a normalised image of float32; got {image.dtype}; make it with "
                "featup_hub.image.preprocess, or use image.float() if it is normalised"
            )
        self.config, self.image = config, image
        self.digest = sha256_of_tensors(backbone.state_dict())
        self.start = "" if start is None else sha256_of_tensors(start.state_dict())
        self.pca, self.views, self.unseen = look(image, backbone, config)
        own = self.views.features[:1].float()
        base = own if config.base == "source" else None
        if start is not None:
            with torch.no_grad():
                # A copy, for the caller's own stays where it is, and in its mode.
                base = copy.deepcopy(start).to(image.device).eval()(own, image)
        with seeded_modules(config.seed):
            model = ImplicitUpsampler(
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
            grid = (own.shape[-2], own.shape[-1])
            objective = Objective(model, config, grid=grid, patch_size=backbone.patch_size)
        if base is not None:  # at first, the base alone
            for parameter in model.layers[-1].parameters():
                nn.init.zeros_(parameter)
        self.objective = objective.to(image.device)
        self.optimizer = torch.optim.NAdam(self.objective.parameters(), lr=config.lr)
        self.error, self.best_step, self.checked = math.inf, 0, 0
        self.best = self._network()

    @property
    def finished(self) -> bool:
        """Whether the held-out views have stopped to gain."""
        looks = (self.checked - self.best_step) // self.config.check_every
        return 0 < self.config.patience <= looks

    def draw(self, step: int) -> Sample:
        """Draws what a step looks at."""
        return draw(
            self.views.jitters,
            self.objective.model.image_size,
            self.objective.grid,
            self.config,
            step,
        )

    def step(self, step: int, passed: float) -> float:
        """Takes one optimiser step, with ``passed`` of the time gone; returns the loss.

        Raises:
            RuntimeError: If the loss is not a finite number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(max(step / self.config.steps, passed))
        sample = self.draw(step)
        observed = self.views.features[sample.chosen.to(self.image.device)].float()
        self.objective.train()
        with seeded_modules(sample.mask):
            loss: Tensor = self.objective(sample, observed)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return converging(loss.item(), "loss", step + 1)

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Looks at the held-out views, and keeps the weights if they are the best so far.

        Raises:
            RuntimeError: If the error is not a finite number.
        """
        self.objective.eval()
        residual = torch.zeros(())
        for part in self.unseen.split(self.config.batch):
            predicted = self.objective.held_out(part.jitters)
            residual = residual + (predicted - part.features.float()).square().sum().cpu()
        total = self.unseen.features.float().square().sum().cpu()
        error = converging(float(residual / total), "held-out error", step)
        self.checked = step
        if error < self.error:
            self.error, self.best_step, self.best = error, step, self._network()

    def result(self, done: int) -> ImplicitUpsampler:
        """Returns the best network seen in the steps ``done``."""
        if done != self.checked or not self.best_step:
            self.check(done)
        model = self.objective.model
        model.load_state_dict(self.best)
        model.scores = {
            "held_out_error": self.error,
            "explained_variance": self.pca.explained,
            "steps": float(self.best_step),
        }
        return model.eval().requires_grad_(False)

    def state(self, step: int) -> dict[str, object]:
        """Returns all that a stopped fit needs to go on after ``step`` steps."""
        return {
            "step": step,
            "config": self._identity(),
            "objective": self.objective.state_dict(),
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
        with restoring(path):
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best, self.best_step = state["best"], state["best_step"]
            self.error, self.checked = state["error"], int(state["step"])
        return self.checked

    def _identity(self) -> dict[str, object]:
        image = sha256_of_tensors({"image": self.image})
        seen = {"image": image, "backbone": self.digest, "start": self.start}
        return {**asdict(self.config), **seen}

    def _network(self) -> dict[str, Tensor]:
        state = self.objective.model.state_dict()
        return {name: value.detach().clone() for name, value in state.items()}


def converging(value: float, name: str, step: int) -> float:
    """Returns a loss or an error, or raises RuntimeError where it is not a finite number."""
    if not math.isfinite(value):
        raise RuntimeError(
            f"a fit needs a finite {name}; it diverged at step {step} ({value}); "
            "lower lr or highest"
        )
    return value
