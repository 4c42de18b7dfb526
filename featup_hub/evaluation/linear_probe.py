"""Linear probes: segmentation by softmax regression, log depth by ridge regression.

The penalty on the weights is chosen on the last fifth of the training images: an overfitted probe
would reward upsamplers that blur. Images stay in file order, because neighbouring frames are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.dataset import Sample

__all__ = ["LinearProbe", "ProbeConfig", "ProbeExamples", "cells", "fit_probe"]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How probes are fitted.

    Attributes:
        steps: Steps of AdamW; the learning rate falls by a cosine over all of them.
        batch_size: Cells per step.
        learning_rate: Learning rate of the first step, for standardised features.
        weight_decays: AdamW's weight decays to choose from.
        ridges: Penalties of the depth regression to choose from, as shares of the number of cells.
        seed: Seed of the order of cells.
    """

    steps: int = 600
    batch_size: int = 1024
    learning_rate: float = 1e-2
    weight_decays: tuple[float, ...] = (0.01, 0.3, 1.0, 3.0)
    ridges: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A 1×1 convolution to class scores, to log depth, or to both.

    Attributes:
        weight: (K, C); K is the number of classes, plus one with depth.
        bias: (K,).
        classes: Number of classes.
        depth_range: Least and greatest depth predicted, metres; None without depth.
    """

    weight: Tensor
    bias: Tensor
    classes: int
    depth_range: tuple[float, float] | None

    def read(self, projected: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Predicts classes and depth from features multiplied by ``weight``.

        Args:
            projected: ``weight`` times upsampled features, without the bias, (1, K, H, W).

        Returns:
            Classes (H, W) or None, depth in metres (H, W) or None.
        """
        outputs = projected[0] + self.bias[:, None, None]
        labels = outputs[: self.classes].argmax(0) if self.classes else None
        depth = outputs[-1].exp().clamp(*self.depth_range) if self.depth_range else None
        return labels, depth


class ProbeExamples(NamedTuple):
    """Features of one image and their truth.

    Attributes:
        features: (N, C).
        shares: Share of each class, (N, K); rows of zeros are void; None without labels.
        log_depth: (N,), NaN where missing; None without depth.
    """

    features: Tensor
    shares: Tensor | None
    log_depth: Tensor | None


def cells(sample: Sample, source: Tensor, classes: int) -> ProbeExamples:
    """Pairs every low-resolution cell with its class shares and its mean log depth."""
    size = (source.shape[-2], source.shape[-1])
    shares = log_depth = None
    if sample.labels is not None:
        onehot = (sample.labels == torch.arange(classes)[:, None, None]).float()
        shares = F.adaptive_avg_pool2d(onehot, size).flatten(1).t()
    if sample.depth is not None:
        log_depth = _mean_log(sample.depth, size)
    return ProbeExamples(source[0].flatten(1).t(), shares, log_depth)


def fit_probe(examples: Iterable[ProbeExamples], *, config: ProbeConfig) -> LinearProbe:
    """Fits a probe to labels, to depth, or to both.

    Args:
        examples: Features and truth of each training image, in order.
        config: How to fit.

    Returns:
        The probe.
    """
    every = list(examples)
    features = torch.cat([each.features for each in every])
    kept = sum(len(each.features) for each in every[: len(every) - len(every) // 5])
    shares = [each.shares for each in every if each.shares is not None]
    depths = [each.log_depth for each in every if each.log_depth is not None]
    heads, classes, depth_range = [], 0, None
    if shares:
        classes = shares[0].shape[1]
        fit = partial(fit_segmentation, config=config)
        heads.append(_chosen(fit, features, torch.cat(shares), kept, config.weight_decays))
    if depths:
        log_depth = torch.cat(depths)
        low, high = log_depth[log_depth.isfinite()].aminmax()
        depth_range = (math.exp(low), math.exp(high))
        heads.append(_chosen(fit_depth, features, log_depth, kept, config.ridges))
    return LinearProbe(
        weight=torch.cat([weight for weight, _ in heads]),
        bias=torch.cat([bias for _, bias in heads]),
        classes=classes,
        depth_range=depth_range,
    )


Head = tuple[Tensor, Tensor]
"""Weight (K, C) and bias (K,)."""


def _chosen(
    fit: Callable[[Tensor, Tensor, float], Head],
    features: Tensor,
    truth: Tensor,
    kept: int,
    penalties: Sequence[float],
) -> Head:
    """Fits with the penalty that is best on the examples after the first ``kept``."""
    best = penalties[0]
    if kept < len(features) and len(penalties) > 1:
        held_out = features[kept:], truth[kept:]
        best = min(
            penalties, key=lambda p: _error(*fit(features[:kept], truth[:kept], p), *held_out)
        )
    return fit(features, truth, best)


def _error(weight: Tensor, bias: Tensor, features: Tensor, truth: Tensor) -> float:
    """Returns the cross-entropy of shares (N, K), or the squared error of log depth (N,)."""
    outputs = F.linear(features, weight, bias)
    if truth.dim() == 1:
        return float((outputs[:, 0] - truth).square().nanmean())
    return float(-(truth * outputs.log_softmax(1)).sum() / truth.sum())


def fit_segmentation(
    features: Tensor, shares: Tensor, weight_decay: float, *, config: ProbeConfig
) -> Head:
    """Fits softmax regression by AdamW.

    Args:
        features: (N, C).
        shares: Share of each class in the cell, (N, K); rows of zeros (void) are ignored.
        weight_decay: AdamW's, for the weight only.
        config: How to fit.

    Returns:
        Weight (K, C) and bias (K,).
    """
    known = shares.sum(1) > 0
    features, shares = features[known], shares[known]
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(config.seed)
    weight = torch.zeros(shares.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(shares.shape[1], requires_grad=True)
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": weight_decay},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        batch = torch.randint(len(features), (config.batch_size,), generator=generator)
        logits = F.linear((features[batch] - mean) / std, weight, bias)
        loss = -(shares[batch] * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _unstandardised(weight.detach(), bias.detach(), mean, std)


def fit_depth(features: Tensor, log_depth: Tensor, ridge: float) -> Head:
    """Fits ridge regression in closed form.

    Args:
        features: (N, C).
        log_depth: (N,), NaN where missing.
        ridge: Penalty as a share of the number of cells.

    Returns:
        Weight (1, C) and bias (1,).
    """
    known = log_depth.isfinite()
    features, target = features[known], log_depth[known].double()
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / std
    gram = (inputs.t() @ inputs).double()
    gram.diagonal().add_(ridge * len(inputs))
    moment = (inputs.t() @ (target - target.mean()).float()).double()
    weight = torch.linalg.solve(gram, moment).float()[None]
    return _unstandardised(weight, target.mean().float()[None], mean, std)


def _unstandardised(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Head:
    weight = weight / std
    return weight, bias - weight @ mean


def _mean_log(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages log depth over the cell's known pixels, NaN where none is known."""
    known = (depth > 0).float()
    log = torch.where(depth > 0, depth, 1.0).log() * known
    total, share = F.adaptive_avg_pool2d(torch.stack([log, known]), size)
    return torch.where(share > 0, total / share, torch.nan).flatten()
