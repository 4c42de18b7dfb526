"""One learned joint bilateral stage: guidance in, kernels out, features filtered with them.

Parameter names are upstream's, whose checkpoints load strictly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; names and
numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, StageWeights, jbu_apply, jbu_kernel

__all__ = ["JBUStage", "pass_stages"]


class PointwiseMLP(nn.Sequential):
    """Two 1×1 convolutions with a GELU between; upstream's indices 0 and 3 hold the weights."""

    def __init__(self, dim_in: int, dim_out: int, *, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(dim_in, dim_out, 1),
            nn.GELU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(dim_out, dim_out, 1),
        )

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns weight and bias of the first layer, then of the second."""
        first, second = cast(nn.Conv2d, self[0]), cast(nn.Conv2d, self[3])
        biases = cast(Tensor, first.bias), cast(Tensor, second.bias)
        return first.weight.flatten(1), biases[0], second.weight.flatten(1), biases[1]

    def drop(self, second: Tensor) -> Tensor:
        """Drops hidden channels of one sample, which is dropping columns of the second layer."""
        mask: Tensor = self[2](torch.ones_like(second[:1])[:, :, None, None])
        return second * mask.flatten()


class JBUStage(nn.Module):
    """One learned joint bilateral stage.

    Args:
        guidance_dim: Channels of the guidance (3: normalised RGB).
        key_dim: Channels in which neighbouring pixels are compared.
        radius: Reach of the kernel; 3 means 7×7 taps.
        dropout: Chance of dropping a hidden channel while training.
    """

    def __init__(
        self, guidance_dim: int = 3, key_dim: int = 32, radius: int = 3, *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        taps = (2 * radius + 1) ** 2
        self.dropout = dropout
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = PointwiseMLP(guidance_dim, key_dim, dropout=dropout)
        self.fixup_proj = PointwiseMLP(taps + guidance_dim, taps, dropout=dropout)

    def weights(self) -> StageWeights:
        """Returns the ten parameters as the operations take them."""
        return StageWeights(
            self.range_temp,
            self.sigma_spatial,
            *self.range_proj.matrices(),
            *self.fixup_proj.matrices(),
        )

    def kernel(self, guidance: Tensor, *, impl: Implementation = "auto") -> Tensor:
        """Predicts one kernel per pixel of the guidance, (B, G, H, W) -> (B, D², H, W)."""
        weights = self.weights()
        if not (self.training and self.dropout > 0):
            return jbu_kernel(guidance, weights, impl=impl)
        kernels = []
        for sample in guidance.split(1):
            dropped = weights._replace(
                range_w1=self.range_proj.drop(weights.range_w1),
                fixup_w1=self.fixup_proj.drop(weights.fixup_w1),
            )
            kernels.append(jbu_kernel(sample, dropped, impl=impl))
        return torch.cat(kernels)

    def forward(self, source: Tensor, guidance: Tensor, *, impl: Implementation = "auto") -> Tensor:
        """Upsamples the source to the guidance's size.

        Args:
            source: Features, (B, C, h, w).
            guidance: The image at the output size, (B, G, H, W).
            impl: Who computes, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, H, W).
        """
        return jbu_apply(source, self.kernel(guidance, impl=impl), impl=impl)


def pass_stages(
    source: Tensor,
    kernels: Iterable[Tensor],
    count: int,
    bias: Tensor | None,
    impl: Implementation,
) -> Tensor:
    """Passes features through the stages that have these kernels.

    Args:
        source: Features, (B, C, h, w).
        kernels: One (B, D², H, W) per stage; from a generator, one at a time is alive.
        count: How many there are.
        bias: Joins in the last stage, (C,).
        impl: Who computes.

    Returns:
        Features at the last kernels' size; the source's where there are none.
    """
    for index, kernel in enumerate(kernels, start=1):
        source = jbu_apply(source, kernel, bias if index == count else None, impl=impl)
    return source if count or bias is None else source + bias[:, None, None]
