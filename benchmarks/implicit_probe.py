r"""Fits an implicit upsampler to every image of an evaluation: a plug-in of its protocols.

    python -m benchmarks.evaluate jbu=weights/jbu_universal.safetensors \
        implicit=benchmarks.implicit_probe:lite0 --protocols preservation --sets camvid \
        --backbones lite16 --images 20 --train-images 120

A fit is kept in a folder beside the features' and taken up again, so an evaluation that was
stopped goes on. The fit sees the image and the backbone, never the labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from featup_hub import ImplicitUpsampler, JBUStack, load_backbone, load_upsampler
from featup_hub.backbones import Backbone
from featup_hub.registry import JBU_UNIVERSAL
from featup_hub.training.implicit import PRESETS, fit

KEPT = Path.home() / ".cache" / "featup_hub_implicit"
CONFIG = replace(PRESETS["fast"], views=50, held_out=8, batch=2, steps=100, lr=1e-2)


def lite0(source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Tells EfficientNet-Lite0's features of an image, (B, C, h, w) -> (B, C, *size).

    ``source`` decides nothing but what is expected: the fit asks the backbone itself.
    """
    return _tell(source, image, size, None)


def lite0_from_jbu(source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """The same, fitted as a residual to what the shipped stages make of the image."""
    return _tell(source, image, size, load_upsampler())


def _tell(source: Tensor, image: Tensor, size: tuple[int, int], start: JBUStack | None) -> Tensor:
    # An evaluation runs without gradients, on tensors that can never have any.
    with torch.inference_mode(False), torch.enable_grad():
        told = [_fitted(one[None].clone(), start).features(size) for one in image]
    found = torch.cat(told)
    if found.shape[1] != source.shape[1]:
        raise ValueError(
            f"this plug-in is for EfficientNet-Lite0's {found.shape[1]} channels; got "
            f"{source.shape[1]}; evaluate with --backbones lite16"
        )
    return found


def _fitted(image: Tensor, start: JBUStack | None) -> ImplicitUpsampler:
    decisive = repr((sorted(asdict(CONFIG).items()), start and JBU_UNIVERSAL.sha256))
    key = hashlib.sha256(image.numpy().tobytes() + decisive.encode())
    path = KEPT / f"{key.hexdigest()[:16]}.safetensors"
    if path.is_file():
        return ImplicitUpsampler.load(path)
    KEPT.mkdir(parents=True, exist_ok=True)
    found = fit(image, _backbone(), CONFIG, start=start)
    found.save(path)
    return found


@cache
def _backbone() -> Backbone:
    return load_backbone("efficientnet_lite0").requires_grad_(False)
