"""One learned joint bilateral stage.

Parameter names are upstream's, so its checkpoints load strictly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; names and
numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, StageWeights, jbu_apply, jbu_kernel

_ZERO_MEAN = 1e-6  # of the largest entry: rounding error in float32 of a mean of zero
_ROUNDED = 0.25  # of the precision and the largest entry: the same, in half precision


class ZeroSumConv2d(nn.Conv2d):
    """A 1×1 convolution that uses and saves its parameters without their means over the outputs.

    Its outputs therefore sum to zero, whatever the parameters are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Applies the convolution, (B, inputs, H, W) -> (B, outputs, H, W)."""
        weight, bias = _without_mean(self.weight), _without_mean(cast(Tensor, self.bias))
        return nn.functional.conv2d(x, weight.to(x), bias.to(x))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # In place, which changes no output: trainers write averages of weights through state dicts.
        with torch.no_grad():
            for matrix in (self.weight, cast(Tensor, self.bias)):
                if not has_zero_mean(matrix):
                    matrix.copy_(_without_mean(matrix))
        super()._save_to_state_dict(destination, prefix, keep_vars)


def has_zero_mean(matrix: Tensor) -> bool:
    """Returns whether the mean over the first axis is zero, up to rounding to its precision."""
    if matrix.is_meta or not matrix.is_floating_point():
        return True
    share = max(_ZERO_MEAN, _ROUNDED * torch.finfo(matrix.dtype).eps)
    matrix = matrix.float()
    return bool(matrix.mean(0).abs().max() <= share * matrix.abs().max())


def _without_mean(matrix: Tensor, axis: int = 0) -> Tensor:
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return matrix - matrix.mean(axis, keepdim=True)


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
        """Returns weight and bias of the first layer, then of the second, as they are saved."""
        first, second = cast(nn.Conv2d, self[0]), cast(nn.Conv2d, self[3])
        biases = cast(Tensor, first.bias), cast(Tensor, second.bias)
        return first.weight.flatten(1), biases[0], second.weight.flatten(1), biases[1]

    def drop(self, second: Tensor) -> Tensor:
        """Drops hidden channels of one sample by dropping columns of the second layer."""
        mask: Tensor = self[2](torch.ones_like(second[:1])[:, :, None, None])
        return second * mask.flatten()


def stage_weights(stages: Sequence[JBUStage]) -> list[StageWeights]:
    """Returns the parameters of stages of one kind, in the form that the operations take."""
    weights = [
        StageWeights(
            stage.range_temp,
            stage.sigma_spatial,
            *stage.range_proj.matrices(),
            *stage.fixup_proj.matrices(),
        )
        for stage in stages
    ]
    if not stages or not isinstance(stages[0].fixup_proj[3], ZeroSumConv2d):
        return weights
    # All stages at once: on a GPU many small operators cost more than their arithmetic.
    matrices, biases = (
        _without_mean(torch.stack(layers), 1)
        for layers in ([w.fixup_w1 for w in weights], [w.fixup_b1 for w in weights])
    )
    return [
        w._replace(fixup_w1=matrix, fixup_b1=bias)
        for w, matrix, bias in zip(weights, matrices, biases, strict=True)
    ]


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
        return stage_weights([self])[0]

    def kernel(
        self,
        guidance: Tensor,
        *,
        weights: StageWeights | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Predicts one kernel per pixel of the guidance, (B, G, H, W) -> (B, D², H, W).

        ``weights`` are :meth:`weights`, if they are at hand.
        """
        weights = self.weights() if weights is None else weights
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
        """Upsamples a source, (B, C, h, w), to the guidance's size, (B, C, H, W)."""
        return jbu_apply(source, self.kernel(guidance, impl=impl), impl=impl)
