"""The multi-view consistency loss of one batch, which JBU training minimises.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featup_hub.training.config import JBUTrainingConfig
from featup_hub.training.losses import magnitude_tv, reconstruction_loss, sampled_crf
from featup_hub.training.synthetic_regions import random_field, random_regions, reduce_regions
from featup_hub.training.training_source import TrainingSource, random_projection
from featup_hub.training.views import Jitter, apply_jitter, sample_jitter
from featup_hub.upsamplers import JBUStack

__all__ = ["consistency_loss"]


def consistency_loss(
    stack: JBUStack,
    source: TrainingSource,
    rgb: Tensor,
    backbone_size: tuple[int, int],
    config: JBUTrainingConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Computes the loss of a stack on a batch of photographs.

    The backbone encodes the photographs and a few jittered views of them. The features of the
    photographs are projected to a few random channels and upsampled. (The stack is linear in the
    source and filters all channels alike, so projecting the source equals projecting the result.)
    The upsampled features are jittered like the views, downsampled by the learned model of the
    backbone, and compared with the features of the views.

    Args:
        stack: The upsampler.
        source: Backbone, downsampler and scale.
        rgb: Photographs, (B, 3, H, W), values in [0, 1].
        backbone_size: Height and width to which images are resized for the backbone.
        config: Views, weights of the terms, size of the projection.
        generator: Random generator, on the CPU.

    Returns:
        ``loss``, its terms before weighting, and ``error``, the mean squared error of the views.
    """
    image = source.normalise(rgb)
    jitters = [_jitters(image, config, generator) for _ in range(config.views)]
    # One pass of the backbone over the photographs and all their views.
    images = torch.cat([image, *(apply_jitter(image, jitter) for jitter in jitters)])
    own, *views = source.observe(images, backbone_size).split(len(image))
    projection = random_projection(source.feat_dim, config.projection_dim, generator).to(own)

    low = source.project(own, projection)
    count = low.shape[1]
    if config.region_weight:
        grid = (own.shape[-2], own.shape[-1])
        regions = _regions(rgb, grid, config, generator)
        cells = reduce_regions(regions, grid, generator)
        if config.region_noise:
            deviation = config.region_noise * torch.rand((), generator=generator).item()
            cells = cells + deviation * torch.randn(cells.shape, generator=generator).to(cells)
        low = torch.cat([low, cells], dim=1)
    upsampled = _upsample(stack, low, image, config.kernel_taps)
    features, saliency, restored = upsampled.tensor_split([len(projection), count], dim=1)
    losses, errors = [], []
    for jitter, view in zip(jitters, views, strict=True):
        predicted = source.downsample(
            apply_jitter(features, jitter),
            apply_jitter(saliency, jitter) if saliency.shape[1] else None,
            (view.shape[-2], view.shape[-1]),
        )
        observed = torch.einsum("kc,bchw->bkhw", projection, view)
        scale = source.scale(view) if config.uncertainty else None
        losses.append(reconstruction_loss(predicted, observed, scale))
        errors.append((predicted.detach() - observed).square().mean())
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
    regions = random_regions(rgb, config.region_channels, generator)
    if not config.region_field:
        return regions
    share = config.region_field * torch.rand((), generator=generator).item()
    size = (rgb.shape[-2], rgb.shape[-1])
    field = random_field(grid, size, (len(rgb), config.region_channels), generator).to(regions)
    return (1 - share) ** 0.5 * regions + share**0.5 * field


def _jitters(image: Tensor, config: JBUTrainingConfig, generator: torch.Generator) -> list[Jitter]:
    size = (image.shape[-2], image.shape[-1])
    return [
        sample_jitter(size, max_pad=config.max_pad, max_zoom=config.max_zoom, generator=generator)
        for _ in image
    ]


def _upsample(stack: JBUStack, source: Tensor, image: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Upsamples. If taps are given, only their gradient reaches the kernels."""
    if not taps:
        return stack(source, image)
    kernels = stack.kernels(image, (source.shape[-2], source.shape[-1]))
    for kernel in kernels.stages:
        mask = kernel.new_zeros(kernel.shape[1], 1, 1)
        mask[list(taps)] = 1
        if kernel.requires_grad:
            kernel.register_hook(mask.mul)
    return stack.upsample(source, kernels)
