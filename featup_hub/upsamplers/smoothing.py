"""Averaging at the source's own resolution: cells with neighbours that look alike.

Upsampling sharpens noise, too. Where features differ from cell to cell more than what is seen in
them, or a classifier behind them is overfitted, averaging pays; where every cell counts, it costs.

Source: a joint bilateral filter, Petschnigg et al., "Digital Photography with Flash and No-Flash
Image Pairs", SIGGRAPH 2004, over cells in place of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, pool_guidance
from featup_hub.ops.reference import reflect_pad

__all__ = ["CellSmoothing"]

_MIN_VARIANCE = 1e-6  # of a plain cell, where the root has no slope


class CellSmoothing(nn.Module):
    r"""A joint bilateral filter over the cells of a source, to be passed before any stage.

    A cell looks as its colours' mean :math:`m` and standard deviation :math:`s` do, so that a cell
    that an edge crosses keeps to itself. Weights are normalised over the neighbourhood:

    .. math:: w_{pq} \propto \exp\left(-\frac{|p-q|^2}{2\sigma_s^2}
        - \frac{|m_p-m_q|^2 + a^2 |s_p-s_q|^2}{2\sigma_r^2}\right)

    Args:
        radius: Reach in cells.
        sigma_spatial: Width :math:`\sigma_s` over distance, in cells: the strength.
        sigma_range: Width :math:`\sigma_r` over looks, in units of the normalised image.
        spread: Weight :math:`a` of the standard deviations.

    Example:
        >>> smoothing = CellSmoothing()
        >>> cells = smoothing.guidance(torch.randn(1, 3, 64, 96), (4, 6))
        >>> smoothing.kernel(cells).shape
        torch.Size([1, 49, 4, 6])
    """

    def __init__(
        self,
        radius: int = 3,
        *,
        sigma_spatial: float = 0.7,
        sigma_range: float = 0.25,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        self.radius = radius
        self.sigma_spatial = nn.Parameter(torch.tensor(sigma_spatial))
        self.sigma_range = nn.Parameter(torch.tensor(sigma_range))
        self.spread = nn.Parameter(torch.tensor(spread))

    def guidance(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the mean and the standard deviation of every cell's colours.

        Args:
            image: The image, (B, G, H, W).
            size: Height and width of the source.

        Returns:
            Means, then deviations, (B, 2G, *size).
        """
        mean = pool_guidance(image, size)
        variance = pool_guidance(image.square(), size) - mean.square()
        return torch.cat([mean, variance.clamp(min=_MIN_VARIANCE).sqrt()], dim=1)

    def kernel(self, guidance: Tensor, *, impl: Implementation = "auto") -> Tensor:
        """Computes one kernel per cell; on so few cells every ``impl`` is served alike.

        Args:
            guidance: From :meth:`guidance`, (B, 2G, h, w).
            impl: Taken for the sake of :class:`~featup_hub.upsamplers.stage.JBUStage`.

        Returns:
            Kernels that sum to one, (B, D², h, w), taps row-major.
        """
        height, width = guidance.shape[-2:]
        mean, deviation = guidance.chunk(2, dim=1)
        looks = torch.cat([mean, self.spread.to(guidance) * deviation], dim=1)
        padded = reflect_pad(looks, self.radius)
        narrow, near = self.sigma_range.to(guidance), self.sigma_spatial.to(guidance)
        logits = []
        for y in range(2 * self.radius + 1):
            for x in range(2 * self.radius + 1):
                neighbour = padded[:, :, y : y + height, x : x + width]
                distance = (y - self.radius) ** 2 + (x - self.radius) ** 2
                unlike = (neighbour - looks).square().sum(1)
                logits.append(-distance / (2 * near**2) - unlike / (2 * narrow**2))
        return torch.stack(logits, dim=1).softmax(dim=1)
