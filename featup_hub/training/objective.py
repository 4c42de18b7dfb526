"""The multi-view consistency loss of one batch, which JBU training minimises.

The backbone encodes the photographs and a few jittered views of them. The features of the
photographs are projected to a few random channels and upsampled. (The stack is linear in the source
and filters all channels alike, so projecting the source equals projecting the result.) The
upsampled features are jittered like the views, downsampled by the learned model of the backbone,
and compared with the features of the views.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featup_hub.training.config import JBUTrainingConfig
from featup_hub.training.losses import magnitude_tv, reconstruction_loss, sampled_crf
from featup_hub.training.synthetic_regions import random_field, random_regions, reduce_regions
from featup_hub.training.training_source import TrainingSource, random_projection
from featup_hub.training.views import apply_jitter, sample_jitter
from featup_hub.upsamplers import JBUStack


def consistency_loss(
    stack: JBUStack,
    source: TrainingSource,
    rgb: Tensor,
    backbone_size: tuple[int, int],
    config: JBUTrainingConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Computes the loss of a stack on a batch of photographs, (B, 3, H, W), values in [0, 1].

    Images are resized to ``backbone_size`` for the backbone. The generator is on the CPU.

    Returns:
        ``loss``, its terms before weighting, and ``error``, the mean squared error of the views.
    """
    image = source.normalise(rgb)
    limits: dict[str, Any] = {"max_pad": config.max_pad, "max_zoom": config.max_zoom}
    size = (rgb.shape[-2], rgb.shape[-1])
    jitters = [
        [sample_jitter(size, **limits, generator=generator) for _ in rgb]
        for _ in range(config.views)
    ]
    # One pass of the backbone over the photographs and all their views.
    images = torch.cat([image, *(apply_jitter(image, jitter) for jitter in jitters)])
    own, *views = source.observe(images, backbone_size).split(len(image))
    projection = random_projection(source.feat_dim, config.projection_dim, generator).to(own)
    grid = (own.shape[-2], own.shape[-1])

    low = source.project(own, projection)
    if config.region_weight:
        regions = _regions(rgb, grid, config, generator)
        cells = reduce_regions(regions, grid, generator)
        if config.region_noise:
            deviation = config.region_noise * torch.rand((), generator=generator).item()
            cells = cells + deviation * torch.randn(cells.shape, generator=generator).to(cells)
        low = torch.cat([low, cells], dim=1)
    count = len(projection)
    own_channels = count + len(source.downsampler.saliency)
    upsampled, restored = stack(low, image).tensor_split([own_channels], dim=1)
    losses, errors = [], []
    for jitter, view in zip(jitters, views, strict=True):
        seen = apply_jitter(upsampled, jitter)
        predicted = source.downsampler(seen[:, :count], grid, saliency=seen[:, count:])
        observed = torch.einsum("kc,bchw->bkhw", projection, view)
        scale = source.scale(view) if config.uncertainty else None
        losses.append(reconstruction_loss(predicted, observed, scale))
        errors.append((predicted.detach() - observed).square().mean())
    features = upsampled[:, :count]
    terms = {"reconstruction": torch.stack(losses).mean()}
    loss = terms["reconstruction"]
    if config.crf_weight:
        terms["crf"] = sampled_crf(image, features, samples=config.crf_samples, generator=generator)
        loss = loss + config.crf_weight * terms["crf"]
    if config.region_weight:
        terms["regions"] = (restored - regions).square().mean()
        loss = loss + config.region_weight * terms["regions"]
    if config.tv_weight:
        terms["tv"] = magnitude_tv(features)
        loss = loss + config.tv_weight * terms["tv"]
    return {"loss": loss, **terms, "error": torch.stack(errors).mean()}


def _regions(
    rgb: Tensor, grid: tuple[int, int], config: JBUTrainingConfig, generator: torch.Generator
) -> Tensor:
    """Draws the features to restore: regions, and a share of smooth fields."""
    regions = random_regions(rgb, config.region_channels, generator)
    if not config.region_field:
        return regions
    share = config.region_field * torch.rand((), generator=generator).item()
    size = (rgb.shape[-2], rgb.shape[-1])
    field = random_field(grid, size, (len(rgb), config.region_channels), generator).to(regions)
    return (1 - share) ** 0.5 * regions + share**0.5 * field
