"""A backbone with known features at every pixel, and a picture for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.backbones import Backbone


class Blur(Backbone):
    """Means of a few functions of the colours over each cell of 8×8 pixels."""

    name = "blur"

    def __init__(self) -> None:
        super().__init__(feat_dim=5, patch_size=8)

    def features(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(self.pixels(image), 8)

    def pixels(self, image: Tensor) -> Tensor:
        return torch.cat([image, image[:, :1] * image[:, 1:2], image[:, 2:].tanh()], dim=1)


def picture(height: int = 40, width: int = 56) -> Tensor:
    """Smooth colours, and a disc of others."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    ground = torch.stack([y, x, y * x])
    disc = ((y - 0.2) ** 2 + (x + 0.1) ** 2 < 0.25).float()
    return (ground * (1 - disc) + disc * torch.tensor([1.5, -1.0, 0.7])[:, None, None])[None]
