"""Preservation and transfer: linear probes on upsampled features.

Preservation fits one probe on low-resolution features, freezes it and applies it to the features
of every upsampler. FeatUp promises features that "can be swapped into existing applications even
without re-training", and the probe is that application. Transfer fits a probe on each upsampler's
own features, at random pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.dataset import Sample
from featup_hub.evaluation.features import Bench
from featup_hub.evaluation.linear_probe import (
    LinearProbe,
    ProbeConfig,
    ProbeExamples,
    cells,
    fit_probe,
)
from featup_hub.evaluation.sums import Measurement

__all__ = ["measure_preservation", "measure_transfer"]


def measure_preservation(bench: Bench, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Fits a probe on low-resolution cells and applies it, frozen, to upsampled features."""
    train = bench.features(bench.train.spread(bench.config.train_images), {1})
    classes = bench.train.classes
    probe = fit_probe(
        (cells(sample, sources[1], classes) for sample, sources in train), config=_settings(bench)
    )
    return [_score(bench, "frozen probe", [(each, probe) for each in candidates])]


def measure_transfer(bench: Bench, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Fits a probe on each upsampler's own features; every second training image is mirrored."""
    train = bench.train.spread(bench.config.transfer_images)
    probed = []
    for each in candidates:
        data = (
            (sample, sources[each.looks])
            for sample, sources in bench.features(train, {each.looks}, mirror=True)
        )
        pixels = sampled_pixels(
            data, each, train.classes, count=bench.config.pixels, seed=bench.config.seed
        )
        probed.append((each, fit_probe(pixels, config=_settings(bench))))
    return [_score(bench, "transfer probe", probed)]


@torch.no_grad()
def sampled_pixels(
    data: Iterable[tuple[Sample, Tensor]],
    upsampler: Candidate,
    classes: int,
    *,
    count: int,
    seed: int,
) -> list[ProbeExamples]:
    """Samples pixels of upsampled features and their truth, the same for every upsampler.

    Args:
        data: Training images and features.
        upsampler: The upsampler.
        classes: Number of classes.
        count: Pixels of each image.
        seed: Seed of the choice of pixels.

    Returns:
        The examples of each image.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for sample, source in data:
        size = (sample.image.shape[-2], sample.image.shape[-1])
        chosen = torch.randint(size[0] * size[1], (count,), generator=generator)
        features = upsampler(source, sample.normalised(), size)[0].flatten(1)[:, chosen].t()
        shares = log_depth = None
        if sample.labels is not None:
            labels = sample.labels.flatten()[chosen, None]
            shares = (labels == torch.arange(classes)).float()
        if sample.depth is not None:
            depth = sample.depth.flatten()[chosen]
            log_depth = torch.where(depth > 0, depth.clamp(min=1e-6).log(), torch.nan)
        examples.append(ProbeExamples(features.contiguous(), shares, log_depth))
    return examples


@torch.inference_mode()
def _score(
    bench: Bench, protocol: str, probed: Sequence[tuple[Candidate, LinearProbe]]
) -> Measurement:
    """Applies every upsampler's probe to its features of every image."""
    found = bench.measurement(protocol)
    looks = {each.looks for each, _ in probed}
    for sample, sources in bench.features(bench.val, looks):
        image = sample.normalised()
        size = (image.shape[-2], image.shape[-1])
        for each, probe in probed:
            projected = each.project(sources[each.looks], image, size, probe.weight)
            labels, depth = probe.read(projected)
            found.add(each.name, sample.sums(labels, depth, probe.classes))
    return found


def _settings(bench: Bench) -> ProbeConfig:
    return ProbeConfig(steps=bench.config.probe_steps, seed=bench.config.seed)
