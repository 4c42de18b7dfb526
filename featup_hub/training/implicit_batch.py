"""Fits several images side by side, as one computation with a leading dimension.

A network of one image is too small to fill a GPU; those of several images, with their parameters
stacked, run as batched products. Every image's loss depends on its own parameters only and NAdam
treats every entry alone, so each takes the same steps as in a fit of its own. Batched products
round otherwise, though, and what rounding changes grows from step to step: results are alike, not
equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from featup_hub.backbones import Backbone
from featup_hub.training.checkpoints import Progress
from featup_hub.training.implicit import PRESETS, ImplicitConfig, Run, converging
from featup_hub.training.implicit_objective import seeded_modules
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack

__all__ = ["fit_batch"]


def fit_batch(
    images: Tensor,
    backbone: Backbone,
    config: ImplicitConfig = PRESETS["fast"],
    *,
    start: JBUStack | None = None,
    progress: bool = False,
    **options: Any,
) -> list[ImplicitUpsampler]:
    """Fits images of one size at the same time.

    Each stops to improve by its own held-out views; the steps go on until all have stopped.

    Args:
        images: Normalised RGB, (N, 3, H, W); their device is where all is computed.
        backbone: Whose features; on the images' device.
        config: What to do, for all alike. ``seconds`` has no part in it: count ``steps``.
        start: Stages whose features are the base, in place of ``config.base``.
        progress: Whether to show progress on the standard error stream.
        **options: Fields of :class:`ImplicitConfig` to set differently.

    Returns:
        One upsampler per image, as :func:`featup_hub.training.implicit.fit` returns it.

    Raises:
        ValueError: If ``images`` is not (N, 3, H, W), or ``config`` limits the time.
        TypeError: If ``images`` is not float32, or there is no such option.
        RuntimeError: If the fit of an image that has not stopped diverges.

    Example:
        >>> from featup_hub import ModuleBackbone
        >>> cnn = ModuleBackbone(torch.nn.Conv2d(3, 8, 8, stride=8), feat_dim=8, patch_size=8)
        >>> images = torch.rand(2, 3, 32, 40)
        >>> found = fit_batch(images, cnn, steps=2, views=4, components=8)
        >>> [upsampler.features().shape for upsampler in found]
        [torch.Size([1, 8, 32, 40]), torch.Size([1, 8, 32, 40])]
    """
    if images.dim() != 4 or images.shape[0] < 1 or images.shape[1] != 3:
        raise ValueError(
            f"fit_batch takes normalised RGB images of one size, (N, 3, H, W) with N >= 1; got "
            f"{tuple(images.shape)}; resize the images, or fit them one by one"
        )
    config = replace(config, **options)
    if config.seconds:
        raise ValueError(
            f"a batch is fitted for a number of steps; got seconds={config.seconds}; "
            "set steps, or fit the images one by one"
        )
    runs = [Run(image[None], backbone, config, start) for image in images]
    batch = _Batch(runs)
    done = 0
    with Progress(config.steps, 0, progress) as bar:
        for step in range(config.steps):
            if all(run.finished for run in runs):
                break
            loss = batch.step(step)
            done = step + 1
            if done % config.check_every == 0 or done == config.steps:
                batch.check(done)
            bar.advance(f"mean loss {loss:.4f}")
    return [run.result(run.checked) for run in runs]


class _Batch:
    """Parameters of several runs, stacked, and one optimiser for all of them."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.parameters, self.buffers = stack_module_state([run.objective for run in runs])
        self.optimizer = torch.optim.NAdam(list(self.parameters.values()))

    def step(self, step: int) -> float:
        """Takes one optimiser step for every image; returns the mean loss."""
        config, objective = self.runs[0].config, self.runs[0].objective.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step / config.steps)
        # Views follow from seed and size, so all images have the same.
        sample = self.runs[0].draw(step)
        views = [run.views.features for run in self.runs]
        observed = torch.stack([seen[sample.chosen.to(seen.device)].float() for seen in views])

        def loss(
            parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], seen: Tensor
        ) -> Tensor:
            return functional_call(objective, (dict(parameters), dict(buffers)), (sample, seen))

        with seeded_modules(sample.mask):
            losses = vmap(loss, randomness="same")(self.parameters, self.buffers, observed)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizer.step()
        told = losses.tolist()
        for n, run in enumerate(self.runs):
            if not run.finished:  # what becomes of the others is of no account
                converging(told[n], f"loss of image {n}", step + 1)
        return sum(told) / len(told)

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Hands parameters to the runs that have not stopped, and has them look."""
        for n, run in enumerate(self.runs):
            if not run.finished:
                for name, parameter in run.objective.named_parameters():
                    parameter.copy_(self.parameters[name][n])
                run.check(step)
