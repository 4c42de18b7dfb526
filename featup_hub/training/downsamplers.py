r"""Learned downsamplers: models of how a backbone reduces high-resolution features to its grid.

Both return a weighted mean of one window per output cell. A cell is ``stride`` taps high and wide.
The map, (H, W), is first resampled bilinearly to (h·stride, w·stride), unless it has that size. The
window of a cell is the ``kernel`` × ``kernel`` taps around its centre; the border is repeated. With
kernel = stride = the patch size, at the image's own resolution, nothing is resampled and the
windows tile the map.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.training.views import sample_map

__all__ = ["AttentionDownsampler", "SimpleDownsampler"]


class SimpleDownsampler(nn.Module):
    """Blurs with one learned non-negative kernel that sums to one, and strides.

    Args:
        stride: Taps per output cell; the backbone's patch size.
        kernel: Side of the window in taps; default: ``stride``.
    """

    def __init__(self, stride: int, kernel: int | None = None) -> None:
        super().__init__()
        self.stride, self.kernel = _check(stride, kernel)
        self.weight = nn.Parameter(torch.ones(self.kernel, self.kernel))

    def blur(self) -> Tensor:
        """Returns the normalised kernel, (kernel, kernel)."""
        weight = self.weight.abs()
        return weight / weight.sum()

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Downsamples features.

        Args:
            features: High-resolution features, (B, C, H, W).
            size: Height and width wanted, (h, w).

        Returns:
            Features, (B, C, h, w).
        """
        features = _fit(features, size, self.stride, self.kernel)
        flat = features.flatten(0, 1)[:, None]
        pooled = F.conv2d(flat, self.blur().to(flat)[None, None], stride=self.stride)
        return pooled.reshape(*features.shape[:2], *size)


class AttentionDownsampler(nn.Module):
    r"""Averages every window with weights that depend on its features.

    .. math:: \sigma_\downarrow(F)_{ij} =
        \operatorname{softmax}(w \odot A(F[\Omega_{ij}]) + b) \cdot F[\Omega_{ij}]

    A is a 1×1 convolution to one channel, the saliency; all positions share w and b.
    Upstream also masks random windows, even in evaluation mode; this class does not.

    Args:
        feat_dim: Channels of the features that give the saliency.
        stride: Taps per output cell; the backbone's patch size.
        kernel: Side of the window in taps; default: ``stride``.
    """

    def __init__(self, feat_dim: int, stride: int, kernel: int | None = None) -> None:
        super().__init__()
        self.stride, self.kernel = _check(stride, kernel)
        bound = feat_dim**-0.5  # the initialisation of nn.Conv2d
        self.saliency = nn.Parameter(torch.empty(1, feat_dim).uniform_(-bound, bound))
        self.offset = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(self.kernel, self.kernel))
        self.bias = nn.Parameter(torch.zeros(self.kernel, self.kernel))

    def forward(
        self, features: Tensor, size: tuple[int, int], *, saliency: Tensor | None = None
    ) -> Tensor:
        """Downsamples features.

        Args:
            features: High-resolution features, (B, C, H, W).
            size: Height and width wanted, (h, w).
            saliency: A(F), (B, 1, H, W). With it, ``features`` may be a projection of F to any
                number of channels.

        Returns:
            Features, (B, C, h, w).
        """
        if saliency is None:
            saliency = F.conv2d(features, self.saliency[:, :, None, None]) + self.offset
        attention = self.attention(saliency, size)
        features = _fit(features, size, self.stride, self.kernel)
        # Blocks of one cell are slices of the map; unfold would copy it.
        (h, w), s = size, self.stride
        total = features.new_zeros(())
        for top in range(0, self.kernel, s):
            for left in range(0, self.kernel, s):
                weights = attention[:, :, top : top + s, :, left : left + s]
                rows, columns = weights.shape[2], weights.shape[4]
                block = features[:, :, top : top + h * s, left : left + w * s]
                block = F.pad(block, (0, w * s - block.shape[3], 0, h * s - block.shape[2]))
                cells = block.unflatten(2, (h, s)).unflatten(4, (w, s))
                cells = cells[:, :, :, :rows, :, :columns]
                total = total + (cells * weights[:, None]).sum((3, 5))
        return total

    def attention(self, saliency: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the weights of every window, (B, h, kernel, w, kernel), from (B, 1, H, W)."""
        k = self.kernel
        windows = F.unfold(_fit(saliency, size, self.stride, k), k, stride=self.stride)
        logits = windows * self.weight.reshape(-1, 1) + self.bias.reshape(-1, 1)
        weights = logits.softmax(1).unflatten(1, (k, k)).unflatten(3, size)
        return weights.permute(0, 3, 1, 4, 2).contiguous()


def _check(stride: int, kernel: int | None) -> tuple[int, int]:
    kernel = stride if kernel is None else kernel
    if stride < 1 or kernel < stride:
        raise ValueError(
            "a downsampler needs stride >= 1 and kernel >= stride, so that every pixel counts; "
            f"got stride={stride}, kernel={kernel}"
        )
    return stride, kernel


def _fit(x: Tensor, size: tuple[int, int], stride: int, kernel: int) -> Tensor:
    """Resamples a map to ``stride`` taps per cell and repeats its border under the windows."""
    wanted = (size[0] * stride, size[1] * stride)
    if kernel == stride and tuple(x.shape[-2:]) == wanted:
        return x
    before = (kernel - stride) // 2
    after = kernel - stride - before
    rows, columns = (
        (torch.arange(-before, n + after, dtype=torch.float64).clamp(0, n - 1) + 0.5) / n
        for n in wanted
    )
    return sample_map(x, rows, columns)
