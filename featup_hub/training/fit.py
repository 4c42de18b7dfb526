"""Fits the features of one image: one map that explains the backbone's features of many views.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), sections 3.1 and 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from featup_hub.backbones import Backbone
from featup_hub.backbones.contract import check_backbone
from featup_hub.files import sha256_of_tensors
from featup_hub.loading import load_upsampler
from featup_hub.ops.jbu import warn_unless_normalised
from featup_hub.training.config import BASIS, PRESETS, FitConfig
from featup_hub.training.least_squares import fit_source
from featup_hub.training.network import fit_network
from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, apply_jitter, sample_jitter
from featup_hub.upsamplers import FittedFeatures, JBUFit, JBUStack

__all__ = ["PRESETS", "FitConfig", "fit"]

_BATCH = 10  # views in one pass of the backbone


def fit(
    image: Tensor,
    backbone: Backbone,
    config: FitConfig = PRESETS["fast"],
    *,
    upsampler: JBUStack | None = None,
    progress: bool = False,
    **options: Any,
) -> FittedFeatures:
    """Fits the features of one image; the result gives features at any size or point.

    The default solves FeatUp's multi-view objective exactly, see
    :mod:`featup_hub.training.least_squares`. ``method="network"`` trains FeatUp's coordinate
    network; ``PRESETS["upstream"]`` has upstream's settings and needs a GPU.

    Least squares needs matrices of n² numbers. With a stride of 16, n is at most about 4,000 up to
    500 pixels a side, and W·H / 64 above, where memory and time grow fast.

    Args:
        image: Normalised RGB of any size, (1, 3, H, W). The fit runs on its device.
        backbone: The backbone, on the image's device.
        config: The configuration.
        upsampler: JBU stages whose kernels are the basis of least squares; default:
            ``jbu_faithful``.
        progress: Whether to show progress on the standard error stream.
        **options: Fields of :class:`FitConfig` to change, such as ``views=50``.

    Returns:
        The fitted features, in evaluation mode. ``scores["held_out_error"]`` is the unexplained
        share of the held-out views' variation.

    Raises:
        ValueError: If ``image`` is not (1, 3, H, W), ``upsampler`` has a closing convolution, or an
            option is out of its range.
        TypeError: If ``image`` is not a float32 tensor, ``backbone`` is not a backbone, or an
            option is unknown.
        RuntimeError: If the backbone's features or the network's loss are not finite, or the
            features are the same everywhere.

    Example:
        >>> from featup_hub import ModuleBackbone
        >>> conv = torch.nn.Conv2d(3, 8, 8, stride=8)
        >>> backbone = ModuleBackbone(conv, feat_dim=8, patch_size=8)
        >>> fitted = fit(torch.randn(1, 3, 32, 40), backbone, views=20, max_pad=6)
        >>> fitted.features((64, 80)).shape
        torch.Size([1, 8, 64, 80])
    """
    check_backbone(backbone)
    if not isinstance(image, Tensor) or image.dtype != torch.float32:
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"fit takes a normalised image as a float32 tensor; got {got}; make it with "
            "model.preprocess(photo), or use image.float() if it is normalised"
        )
    if image.dim() != 4 or image.shape[:2] != (1, 3):
        raise ValueError(
            f"fit takes one normalised RGB image, (1, 3, H, W); got {tuple(image.shape)}; "
            "fit several images one by one"
        )
    if upsampler is not None and upsampler.feat_dim is not None:
        raise ValueError(
            "fit takes JBU stages alone; got an upsampler with a closing convolution for "
            f"{upsampler.feat_dim} channels; use load_upsampler(), or leave upsampler out"
        )
    warn_unless_normalised(image, stacklevel=3)
    config = replace(config, **options)
    found: FittedFeatures
    count = config.views + config.held_out
    with _evaluating(backbone), tqdm(total=count, unit="view", disable=not progress) as bar:
        fitted = _observe(image, backbone, _draw(image, config, 0, config.views - 1), bar)
        held_out = _observe(image, backbone, _draw(image, config, 1, config.held_out), bar)
        if config.method == "network":
            # Training needs gradients, which the caller may have turned off.
            with torch.inference_mode(False), torch.enable_grad():
                stride = backbone.patch_size
                found, error = fit_network(image.clone(), fitted, held_out, stride, config)
        else:
            # A copy: the caller's upsampler stays on its device and in its mode.
            stages = load_upsampler(BASIS) if upsampler is None else copy.deepcopy(upsampler)
            stages.to(image.device).eval()
            with torch.no_grad():
                source, error = fit_source(image, stages, fitted, held_out)
            found = JBUFit(image, source, stages)
    found.backbone = str(getattr(backbone, "name", type(backbone).__name__))
    found.backbone_digest = sha256_of_tensors(backbone.state_dict())
    found.scores = {"held_out_error": error}
    return found.eval().requires_grad_(False)


def _draw(image: Tensor, config: FitConfig, kind: int, count: int) -> list[Jitter]:
    """Draws views; the first of kind 0 is the image itself."""
    generator, size = seeded(config.seed, 3, kind), (image.shape[-2], image.shape[-1])
    return [Jitter()] * (kind == 0) + [
        sample_jitter(size, max_pad=config.max_pad, max_zoom=config.max_zoom, generator=generator)
        for _ in range(count)
    ]


def _observe(
    image: Tensor, backbone: Backbone, jitters: Sequence[Jitter], bar: tqdm[Any]
) -> Iterator[tuple[Sequence[Jitter], Tensor]]:
    """Yields a few views at a time with their features, (V, C, h, w)."""
    for first in range(0, len(jitters), _BATCH):
        part = jitters[first : first + _BATCH]
        with torch.no_grad():
            views = apply_jitter(image.expand(len(part), -1, -1, -1), part)
            features = backbone(views.contiguous(memory_format=torch.channels_last)).float()
        if not features.isfinite().all():
            raise RuntimeError(
                "a fit needs finite features; the backbone gave NaN or infinity; check that the "
                "image is normalised, and the backbone's weights"
            )
        places = features.transpose(0, 1).flatten(1)  # (C, V·h·w)
        if first == 0 and places.shape[1] > 1 and (places == places[:, :1]).all():
            raise RuntimeError(
                "a fit needs features that differ from place to place; the backbone gave the same "
                "everywhere; check the image, and the backbone's weights"
            )
        bar.update(len(part))
        yield part, features


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """Puts a backbone into evaluation mode and restores all modes afterwards."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        # Not backbone.train(): it would unfreeze frozen normalisation layers.
        for module, training in modes:
            module.training = training
