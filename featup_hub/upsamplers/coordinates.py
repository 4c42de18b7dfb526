"""Positions in an image: pixel centres, their Fourier features, and sampling a map at them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FourierFeatures(nn.Module):
    """Sines and cosines of five signals, with frequencies in geometric progression.

    ``log_range`` holds the natural logarithms of the lowest and the highest, in radians per unit.
    """

    frequency: Tensor

    def __init__(self, frequencies: int, log_range: tuple[float, float]) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.linspace(*log_range, frequencies).exp())
        self.phase = nn.Parameter(torch.randn(2, 5, frequencies))

    def forward(self, signals: Tensor) -> Tensor:
        """Returns sin(ωs + φ), then cos(ωs + ψ), each signal by signal: (N, 5) -> (N, 10n)."""
        angle = signals[:, :, None] * self.frequency  # (N, 5, n)
        waves = torch.stack([(angle + self.phase[0]).sin(), (angle + self.phase[1]).cos()], dim=1)
        return waves.flatten(1)


def pixel_centres(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Returns the pixels' centres in fractions of height and width, (H, W, 2)."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def sample(x: Tensor, position: Tensor) -> Tensor:
    """Interpolates a map, (1, C, H, W), at fractions of its height and width, (N, 2): (N, C).

    Beyond the outermost pixel centres the border is repeated.
    """
    # Clamping replaces padding_mode="border", which older releases of torch lack on Apple's
    # devices. It keeps the positions' precision: bfloat16 would round points at the edge to the
    # outside.
    rows, columns = (
        part.clamp(0.5 / n, 1 - 0.5 / n)
        for part, n in zip(position.unbind(1), x.shape[-2:], strict=True)
    )
    grid = 2 * torch.stack([columns, rows], dim=1)[None, None] - 1
    return F.grid_sample(x.to(grid), grid, align_corners=False)[0, :, 0].t()
