"""What upsampled features are worth to a linear probe: preservation and transfer.

Preservation fits one probe on low-resolution features, freezes it and applies it to everybody's
upsampled ones: FeatUp promises features that "can be swapped into existing applications even
without re-training", and the probe is that application. Transfer fits a probe on each upsampler's
own features, at random pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.features import CachedFeatures
from featup_hub.evaluation.measurement import Bench, Measurement
from featup_hub.evaluation.probes import Lesson, LinearProbe, ProbeConfig, cells, fit_probe
from featup_hub.evaluation.truth import sums_against

__all__ = ["measure_preservation", "measure_transfer"]


def measure_preservation(bench: Bench, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Fits a probe on low-resolution cells and applies it, frozen, to upsampled features."""
    train = bench.features(bench.train.spread(bench.config.train_images))
    classes = bench.train.classes
    probe = fit_probe(
        (cells(sample, source, classes) for sample, source in train), config=_settings(bench)
    )
    return [_score(bench, "frozen probe", [(each, probe) for each in candidates])]


def measure_transfer(bench: Bench, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Fits a probe on each upsampler's own features; every second training image is mirrored."""
    train = bench.features(bench.train.spread(bench.config.transfer_images), mirror=True)
    probed = []
    for each in candidates:
        pixels = sampled_pixels(train, each, count=bench.config.pixels, seed=bench.config.seed)
        probed.append((each, fit_probe(pixels, config=_settings(bench))))
    return [_score(bench, "transfer probe", probed)]


@torch.no_grad()
def sampled_pixels(
    data: CachedFeatures, upsampler: Candidate, *, count: int, seed: int
) -> list[Lesson]:
    """Samples pixels of upsampled features and their truth, the same for every upsampler.

    Args:
        data: Training images and features.
        upsampler: The upsampler.
        count: Pixels of each image.
        seed: Decides which.

    Returns:
        One lesson per image.
    """
    generator = torch.Generator().manual_seed(seed)
    lessons = []
    for sample, source in data:
        size = (sample.image.shape[-2], sample.image.shape[-1])
        chosen = torch.randint(size[0] * size[1], (count,), generator=generator)
        features = upsampler(source, sample.normalised(), size)[0].flatten(1)[:, chosen].t()
        shares = log_depth = None
        if sample.labels is not None:
            labels = sample.labels.flatten()[chosen, None]
            shares = (labels == torch.arange(data.folder.classes)).float()
        if sample.depth is not None:
            depth = sample.depth.flatten()[chosen]
            log_depth = torch.where(depth > 0, depth.clamp(min=1e-6).log(), torch.nan)
        lessons.append(Lesson(features.contiguous(), shares, log_depth))
    return lessons


@torch.inference_mode()
def _score(
    bench: Bench, protocol: str, probed: Sequence[tuple[Candidate, LinearProbe]]
) -> Measurement:
    """Applies every upsampler's probe to its features of every image."""
    found = bench.measurement(protocol)
    for sample, source in bench.features(bench.val):
        image = sample.normalised()
        size = (image.shape[-2], image.shape[-1])
        for each, probe in probed:
            labels, depth = probe.read(each.project(source, image, size, probe.weight))
            found.add(each.name, sums_against(sample, labels, depth, probe.classes))
    return found


def _settings(bench: Bench) -> ProbeConfig:
    return ProbeConfig(steps=bench.config.probe_steps, seed=bench.config.seed)
