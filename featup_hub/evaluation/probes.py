"""Linear probes on upsampled features: segmentation, log depth, or both.

Preservation fits one probe on low-resolution features, freezes it and applies it to the features
of every upsampler. FeatUp promises features that "can be swapped into existing applications even
without re-training", and the probe is that application. Transfer fits a probe on each upsampler's
own features, at random pixels.

Classes are found by softmax regression, log depth by ridge regression. The penalty on the weights
is chosen on the last fifth of the training images: an overfitted probe would reward upsamplers that
blur. Images stay in file order, because neighbouring frames are alike.
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

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.dataset import Sample
from featup_hub.evaluation.features import Bench
from featup_hub.evaluation.sums import Results

BATCH, LEARNING_RATE = 1024, 1e-2  # cells per step of AdamW, and the rate of its first step
WEIGHT_DECAYS = (0.01, 0.3, 1.0, 3.0)  # to choose from, for classes
RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)  # to choose from, for depth; shares of the cells

Head = tuple[Tensor, Tensor]
"""Weight (K, C) and bias (K,)."""


def measure_preservation(bench: Bench, candidates: Sequence[Candidate]) -> Results:
    """Fits a probe on low-resolution cells and applies it, frozen, to upsampled features."""
    config, train = bench.config, bench.train.spread(bench.config.train_images)
    examples = (
        cells(sample, sources[1], train.classes) for sample, sources in bench.features(train, {1})
    )
    probe = fit_probe(examples, steps=config.probe_steps, seed=config.seed)
    yield from _score(bench, "frozen probe", [(each, probe) for each in candidates])


def measure_transfer(bench: Bench, candidates: Sequence[Candidate]) -> Results:
    """Fits a probe on each upsampler's own features; every second training image is mirrored."""
    config, train = bench.config, bench.train.spread(bench.config.transfer_images)
    probed = []
    for each in candidates:
        # The same pixels for every upsampler.
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            examples = [
                pixels(sample, sources[each.looks], each, train.classes, config.pixels, generator)
                for sample, sources in bench.features(train, {each.looks}, mirror=True)
            ]
        probe = fit_probe(examples, steps=config.probe_steps, seed=config.seed)
        probed.append((each, probe))
    yield from _score(bench, "transfer probe", probed)


@torch.inference_mode()
def _score(bench: Bench, protocol: str, probed: Sequence[tuple[Candidate, LinearProbe]]) -> Results:
    """Applies every upsampler's probe to its features of every image."""
    for sample, sources in bench.features(bench.val, {each.looks for each, _ in probed}):
        image = sample.normalised()
        for each, probe in probed:
            projected = each.project(sources[each.looks], image, sample.size, probe.weight)
            labels, depth = probe.read(projected)
            yield protocol, each.name, sample.sums(labels, depth, probe.classes)


class ProbeExamples(NamedTuple):
    """Features of one image and their truth, where there is any."""

    features: Tensor  # (N, C)
    shares: Tensor | None  # of each class, (N, K); rows of zeros are void
    log_depth: Tensor | None  # (N,), NaN where missing


def cells(sample: Sample, source: Tensor, classes: int) -> ProbeExamples:
    """Pairs every low-resolution cell with its class shares and its mean log depth."""
    size = (source.shape[-2], source.shape[-1])
    shares = log_depth = None
    if sample.labels is not None:
        shares = sample.shares(classes, size).flatten(1).t()
    if sample.depth is not None:
        known = (sample.depth > 0).float()
        log = torch.where(sample.depth > 0, sample.depth, 1.0).log() * known
        total, share = F.adaptive_avg_pool2d(torch.stack([log, known]), size)
        log_depth = torch.where(share > 0, total / share, torch.nan).flatten()
    return ProbeExamples(source[0].flatten(1).t(), shares, log_depth)


def pixels(
    sample: Sample,
    source: Tensor,
    upsampler: Candidate,
    classes: int,
    count: int,
    generator: torch.Generator,
) -> ProbeExamples:
    """Draws ``count`` pixels of upsampled features and their truth."""
    chosen = torch.randint(math.prod(sample.size), (count,), generator=generator)
    features = upsampler(source, sample.normalised(), sample.size)[0].flatten(1)[:, chosen].t()
    shares = log_depth = None
    if sample.labels is not None:
        shares = (sample.labels.flatten()[chosen, None] == torch.arange(classes)).float()
    if sample.depth is not None:
        depth = sample.depth.flatten()[chosen]
        log_depth = torch.where(depth > 0, depth.clamp(min=1e-6).log(), torch.nan)
    return ProbeExamples(features.contiguous(), shares, log_depth)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A 1×1 convolution to class scores, to log depth, or to both."""

    weight: Tensor  # (K, C); K is the number of classes, plus one with depth
    bias: Tensor  # (K,)
    classes: int
    depth_range: tuple[float, float] | None  # predicted, in metres; None without depth

    def read(self, projected: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Predicts classes and depth, (H, W) each, where the probe has such outputs.

        ``projected`` is ``weight`` times upsampled features, without the bias, (1, K, H, W).
        """
        outputs = projected[0] + self.bias[:, None, None]
        labels = outputs[: self.classes].argmax(0) if self.classes else None
        depth = outputs[-1].exp().clamp(*self.depth_range) if self.depth_range else None
        return labels, depth


def fit_probe(examples: Iterable[ProbeExamples], *, steps: int, seed: int = 0) -> LinearProbe:
    """Fits a probe to the truth there is; ``steps`` and ``seed`` are of the softmax regression."""
    every = list(examples)
    features = torch.cat([each.features for each in every])
    kept = sum(len(each.features) for each in every[: len(every) - len(every) // 5])
    shares = [each.shares for each in every if each.shares is not None]
    depths = [each.log_depth for each in every if each.log_depth is not None]
    heads, classes, depth_range = [], 0, None
    if shares:
        classes = shares[0].shape[1]
        fit = partial(fit_segmentation, steps=steps, seed=seed)
        heads.append(_chosen(fit, features, torch.cat(shares), kept, WEIGHT_DECAYS))
    if depths:
        log_depth = torch.cat(depths)
        low, high = log_depth[log_depth.isfinite()].aminmax()
        depth_range = (math.exp(low), math.exp(high))
        heads.append(_chosen(fit_depth, features, log_depth, kept, RIDGES))
    weights, biases = zip(*heads, strict=True)
    return LinearProbe(
        weight=torch.cat(weights), bias=torch.cat(biases), classes=classes, depth_range=depth_range
    )


def _chosen(
    fit: Callable[[Tensor, Tensor, float], Head],
    features: Tensor,
    truth: Tensor,
    kept: int,
    penalties: Sequence[float],
) -> Head:
    """Fits with the penalty that is best on the examples after the first ``kept``."""

    def error(penalty: float) -> float:
        """Returns the cross-entropy of shares (N, K), or the squared error of log depth (N,)."""
        outputs = F.linear(features[kept:], *fit(features[:kept], truth[:kept], penalty))
        if truth.dim() == 1:
            return float((outputs[:, 0] - truth[kept:]).square().nanmean())
        return float(-(truth[kept:] * outputs.log_softmax(1)).sum() / truth[kept:].sum())

    return fit(features, truth, min(penalties, key=error) if kept < len(features) else penalties[0])


def fit_segmentation(
    features: Tensor, shares: Tensor, weight_decay: float, *, steps: int, seed: int = 0
) -> Head:
    """Fits softmax regression by AdamW to shares of classes, (N, K), see :class:`ProbeExamples`.

    The learning rate falls by a cosine over all steps. The weight decay does not act on the bias.
    """
    known = shares.sum(1) > 0
    features, shares = features[known], shares[known]
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(shares.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(shares.shape[1], requires_grad=True)
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": weight_decay},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(features), (BATCH,), generator=generator)
        logits = F.linear((features[batch] - mean) / std, weight, bias)
        loss = -(shares[batch] * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _unstandardised(weight.detach(), bias.detach(), mean, std)


def fit_depth(features: Tensor, log_depth: Tensor, ridge: float) -> Head:
    """Fits ridge regression in closed form; the penalty is a share of the number of cells."""
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
