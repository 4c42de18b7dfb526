"""Shared by tests of backbones: the image as a network saw it in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD


def native(config: Mapping[str, Any], image: Tensor) -> Tensor:
    """Converts ImageNet's normalisation to that of a network of timm."""
    values = (IMAGENET_MEAN, IMAGENET_STD, config["mean"], config["std"])
    mean, std, own_mean, own_std = (torch.tensor(value)[:, None, None] for value in values)
    return (image * std + mean - own_mean) / own_std
