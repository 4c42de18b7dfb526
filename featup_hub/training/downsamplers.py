r"""Learned downsamplers: models of how a backbone reduces high-resolution features to its grid.

A cell of the grid is ``stride`` taps high and wide. A map of another size is first resampled to
that bilinearly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featup_hub.training.views import centres, sample_map


class SimpleDownsampler(nn.Module):
    """Averages every cell with one learned non-negative kernel, the same for all channels."""

    saliency: Tensor

    def __init__(self, feat_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.ones(stride, stride))
        self.register_buffer("saliency", torch.empty(0, feat_dim), persistent=False)

    def forward(
        self, features: Tensor, size: tuple[int, int], *, saliency: Tensor | None = None
    ) -> Tensor:
        """Downsamples features, (B, C, H, W) -> (B, C, h, w); ``saliency`` has no channels."""
        weight = self.weight.abs()
        cells = _cells(features, size, self.stride)
        return torch.einsum("bchiwj,ij->bchw", cells, weight / weight.sum())


class AttentionDownsampler(nn.Module):
    r"""Averages every cell with weights that depend on its features.

    .. math:: \sigma_\downarrow(F)_{ij} =
        \operatorname{softmax}(w \odot A(F[\Omega_{ij}]) + b) \cdot F[\Omega_{ij}]

    A is a 1×1 convolution to one channel, the saliency; all cells share w and b. Upstream also
    masks random windows, even in evaluation mode; this class does not.
    """

    def __init__(self, feat_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        bound = feat_dim**-0.5  # the initialisation of nn.Conv2d
        self.saliency = nn.Parameter(torch.empty(1, feat_dim).uniform_(-bound, bound))
        self.offset = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(stride, stride))
        self.bias = nn.Parameter(torch.zeros(stride, stride))

    def forward(
        self, features: Tensor, size: tuple[int, int], *, saliency: Tensor | None = None
    ) -> Tensor:
        """Downsamples features, (B, C, H, W) -> (B, C, h, w).

        ``saliency`` is A(F) without the offset, (B, 1, H, W). With it, ``features`` may be a
        projection of F to any number of channels.
        """
        if saliency is None:
            saliency = torch.einsum("kc,bchw->bkhw", self.saliency, features)
        windows = _cells(saliency + self.offset, size, self.stride)
        logits = windows * self.weight[:, None] + self.bias[:, None]
        attention = logits.transpose(3, 4).flatten(4).softmax(4).unflatten(4, self.weight.shape)
        return torch.einsum("bchiwj,bkhwij->bchw", _cells(features, size, self.stride), attention)


def _cells(x: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Splits a map into cells, (B, C, H, W) -> (B, C, h, stride, w, stride)."""
    rows, columns = (n * stride for n in size)
    if tuple(x.shape[-2:]) != (rows, columns):
        x = sample_map(x, centres(rows), centres(columns))
    return x.unflatten(3, (size[1], stride)).unflatten(2, (size[0], stride))
