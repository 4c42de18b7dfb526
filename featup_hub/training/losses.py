r"""The terms of the training losses.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), eqs. 1 and 8; the constants of
the conditional random field agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MIN_SCALE = 1e-4


class ScaleNet(nn.Module):
    """Predicts the error's standard deviation per position, max(exp(conv1×1(f) + 0.1), 1e-4)."""

    def __init__(self, feat_dim: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(feat_dim, 1, 1)
        with torch.no_grad():  # almost the same scale everywhere at the start
            for parameter in self.net.parameters():
                parameter.mul_(0.1)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the scale per position, (B, C, h, w) -> (B, 1, h, w)."""
        return torch.exp(self.net(features) + 0.1).clamp(min=MIN_SCALE)


def reconstruction_loss(predicted: Tensor, observed: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Returns the mean of :math:`(p - o)^2 / 2s^2 + \log s` over all entries.

    Args:
        predicted: Downsampled view of the high-resolution features, (B, C, h, w).
        observed: The backbone's features of the view, (B, C, h, w).
        scale: Predicted standard deviation s, (B, 1, h, w); default: 1.
    """
    squares = (predicted - observed).square()
    if scale is None:
        return squares.mean() / 2
    return (squares.mean(1, keepdim=True) / (2 * scale.square()) + scale.log()).mean()


def magnitude_tv(features: Tensor) -> Tensor:
    """Returns the total variation of the features' magnitudes, of (B, C, H, W).

    That is the mean square of differences of vertical, plus that of horizontal neighbours.
    """
    length = _magnitudes(features)
    return length.diff(dim=1).square().mean() + length.diff(dim=2).square().mean()


def mean_magnitude(features: Tensor) -> Tensor:
    """Returns the mean magnitude of the features, (B, C, H, W)."""
    return _magnitudes(features).mean()


def _magnitudes(features: Tensor) -> Tensor:
    # The gradient of the magnitude is undefined at zero; the floor makes it zero.
    return features.square().sum(1).clamp(min=1e-12).sqrt()


def blur_residual(features: Tensor) -> Tensor:
    """Returns the mean of (F − g ∗ F)², where g = [1 2 1]ᵀ[1 2 1] / 16; the border is repeated."""
    blurred = features
    for axis in (2, 3):
        n = blurred.shape[axis]
        before = torch.cat([blurred.narrow(axis, 0, 1), blurred.narrow(axis, 0, n - 1)], axis)
        after = torch.cat([blurred.narrow(axis, 1, n - 1), blurred.narrow(axis, n - 1, 1)], axis)
        blurred = (before + 2 * blurred + after) / 4
    return (features - blurred).square().mean()


def sampled_crf(
    image: Tensor,
    features: Tensor,
    *,
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Returns the energy of a conditional random field between random pixels of an image.

    .. math::
        \operatorname{mean}_{p,q}\; \|F_p - F_q\|^2 \left(10\, e^{-\|p-q\|^2 / 0.2 -
        \|I_p - I_q\|^2 / 0.3} + 3\, e^{-\|p-q\|^2 / 0.01}\right)

    Positions are in units of the longer side. The image is normalised RGB, (B, 3, H, W), at the
    size of the features, (B, C, H, W). All images of a batch use the same pixels, ``samples`` of
    them, drawn by the generator, which is on the CPU.
    """
    height, width = image.shape[-2:]
    pixel = torch.randint(height * width, (samples,), generator=generator)
    position = torch.stack([pixel // width, pixel % width], 1) / max(height, width)
    pixel, position = pixel.to(image.device), position.to(image)[None]
    near, alike, differ = (
        _square_distances(x)
        for x in (
            position,
            image.flatten(2)[:, :, pixel].transpose(1, 2),
            features.flatten(2)[:, :, pixel].transpose(1, 2),
        )
    )
    similarity = 10 * torch.exp(-near / 0.2 - alike / 0.3) + 3 * torch.exp(-near / 0.01)
    return (differ * similarity).mean()


def _square_distances(x: Tensor) -> Tensor:
    """Returns ‖x_p − x_q‖² for all pairs, (B, N, C) -> (B, N, N)."""
    squares = x.square().sum(2)
    distances = squares[:, :, None] + squares[:, None, :] - 2 * x @ x.transpose(1, 2)
    return distances.clamp(min=0)
