"""One learned joint bilateral stage.

Parameter names are upstream's, so its checkpoints load strictly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; names and
numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, StageWeights, jbu_apply, jbu_kernel

__all__ = ["JBUStage", "has_zero_mean"]

_ZERO_MEAN = 1e-6  # of the largest entry: rounding error in float32 of a mean of zero


class ZeroSumConv2d(nn.Conv2d):
    """A 1×1 convolution with outputs that sum to zero for any parameters.

    It uses and saves weight and bias without their means over the outputs.
    """

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns the weight and bias in use, (outputs, inputs) and (outputs,)."""
        return _without_mean(self.weight.flatten(1)), _without_mean(cast(Tensor, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the convolution, (B, inputs, H, W) -> (B, outputs, H, W)."""
        weight, bias = self.matrices()
        return nn.functional.conv2d(x, weight[:, :, None, None].to(x), bias.to(x))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in (f"{prefix}weight", f"{prefix}bias"):
            if not has_zero_mean(destination[key]):
                destination[key] = _without_mean(destination[key]).to(destination[key])


def has_zero_mean(matrix: Tensor) -> bool:
    """Returns whether the mean over the first axis is zero, up to rounding to float32."""
    if matrix.is_meta:
        return True
    return bool(matrix.mean(0).abs().max() <= _ZERO_MEAN * matrix.abs().max())


def _without_mean(matrix: Tensor) -> Tensor:
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return matrix - matrix.mean(0)


class PointwiseMLP(nn.Sequential):
    """Two 1×1 convolutions with a GELU between; upstream's indices 0 and 3 have the weights."""

    def __init__(
        self, dim_in: int, dim_out: int, *, dropout: float, zero_sum: bool = False
    ) -> None:
        super().__init__(
            nn.Conv2d(dim_in, dim_out, 1),
            nn.GELU(),
            nn.Dropout2d(dropout),
            (ZeroSumConv2d if zero_sum else nn.Conv2d)(dim_out, dim_out, 1),
        )

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns weight and bias of the first layer, then of the second."""
        first, second = cast(nn.Conv2d, self[0]), cast(nn.Conv2d, self[3])
        weight, bias = (
            second.matrices()
            if isinstance(second, ZeroSumConv2d)
            else (second.weight.flatten(1), cast(Tensor, second.bias))
        )
        return first.weight.flatten(1), cast(Tensor, first.bias), weight, bias

    def drop(self, second: Tensor) -> Tensor:
        """Drops hidden channels of one sample by dropping columns of the second layer."""
        mask: Tensor = self[2](torch.ones_like(second[:1])[:, :, None, None])
        return second * mask.flatten()


class JBUStage(nn.Module):
    """One learned joint bilateral stage.

    Args:
        guidance_dim: Channels of the guidance (3: normalised RGB).
        key_dim: Channels in which neighbouring pixels are compared.
        radius: Reach of the kernel; 3 means 7×7 taps.
        dropout: Probability of dropping a hidden channel in training.
        unit_sum: Whether every kernel sums to one, before and during training. The learned
            correction, 0.1·(W h + b), then uses W and b without their means over the taps.
    """

    def __init__(
        self,
        guidance_dim: int = 3,
        key_dim: int = 32,
        radius: int = 3,
        *,
        dropout: float = 0.1,
        unit_sum: bool = False,
    ) -> None:
        super().__init__()
        taps = (2 * radius + 1) ** 2
        self.dropout = dropout
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = PointwiseMLP(guidance_dim, key_dim, dropout=dropout)
        self.fixup_proj = PointwiseMLP(
            taps + guidance_dim, taps, dropout=dropout, zero_sum=unit_sum
        )

    def weights(self) -> StageWeights:
        """Returns the ten parameters in the form that the operations take."""
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
            impl: Implementation, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, H, W).
        """
        return jbu_apply(source, self.kernel(guidance, impl=impl), impl=impl)
