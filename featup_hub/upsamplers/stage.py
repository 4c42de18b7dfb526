"""One learned joint bilateral stage, and the plan of a stack: sizes, stages, kernels.

Parameter names are upstream's, so its checkpoints load strictly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; names and
numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, StageWeights, jbu_apply, jbu_kernel
from featup_hub.upsamplers.joint import JointKernels

__all__ = ["JBUKernels", "JBUPlan", "JBUStage", "output_size", "stage_sizes"]

_ZERO_MEAN = 1e-6  # of the largest entry: rounding error in float32 of a mean of zero


def stage_sizes(
    source_size: tuple[int, int], output_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Plans the sizes from source to output.

    There are n = ceil(log2 of the larger ratio) stages, counted from the output. The last stage
    makes the output, the one before it half of that (rounded up), and so on, never below the
    source. So every stage except the first doubles the size, up to the rounding of odd sizes. The
    first stage, which is the cheapest, takes the remaining ratio.

    Args:
        source_size: Height and width of the features.
        output_size: Height and width wanted, neither smaller than the source's.

    Returns:
        One size per stage, ``output_size`` last; empty if the sizes are equal.

    Raises:
        ValueError: If the output is smaller than the source.

    Example:
        >>> stage_sizes((14, 14), (224, 224))
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> stage_sizes((16, 16), (224, 224))  # patch 14: the first stage has ratio 1.75
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> stage_sizes((12, 15), (360, 480))  # stride 32 takes five stages
        [(23, 30), (45, 60), (90, 120), (180, 240), (360, 480)]
    """
    (h, w), (height, width) = source_size, output_size
    if height < h or width < w:
        raise ValueError(
            f"the output must be at least as large as the source, {h}×{w}; "
            f"got {height}×{width}; resize features with torch.nn.functional.interpolate instead"
        )
    # Uses only comparisons, so that the number of stages is an int when sizes are symbolic. Does
    # not divide negative numbers, because ONNX rounds them towards zero.
    count = 0
    while height > h * 2**count or width > w * 2**count:
        count += 1
    steps = [2**left for left in range(count - 1, -1, -1)]
    return [
        (max((height + step - 1) // step, h), max((width + step - 1) // step, w)) for step in steps
    ]


def output_size(guidance: Tensor, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Returns the height and width of the output.

    Args:
        guidance: The image, (B, G, H, W).
        size: Height and width; or the length of the short side, which keeps the image's aspect
            ratio; or None for the image's own size.

    Example:
        >>> output_size(torch.zeros(1, 3, 60, 90), 40)
        (40, 60)
    """
    height, width = guidance.shape[-2:]
    if size is None:
        return height, width
    if isinstance(size, (int, Integral)):
        size = int(size)
        short = min(height, width)
        return (height * size + short // 2) // short, (width * size + short // 2) // short
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or any(isinstance(side, float) for side in size):
        raise TypeError(f"size must be a number of pixels, or (height, width); got {size!r}")
    return size[0], size[1]


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
            impl: Who computes, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, H, W).
        """
        return jbu_apply(source, self.kernel(guidance, impl=impl), impl=impl)


@dataclass(frozen=True, kw_only=True)
class JBUPlan:
    """Plan of a stack's computation for an image.

    Attributes:
        size: Height and width of the output.
        first: Kernels of the joint bilateral stage, which comes first; None if there is none.
        stages: The learned stages after it, each with its guidance, (B, G, H, W).
        shrink: The stages' result is larger than the output by this factor, and is averaged down.
    """

    size: tuple[int, int]
    first: JointKernels | None
    stages: list[tuple[JBUStage, Tensor]]
    shrink: int


@dataclass(frozen=True, kw_only=True)
class JBUKernels:
    """All kernels of an image, for any number of feature maps of one size.

    Attributes:
        source_size: Height and width of the features that the kernels are for.
        stages: Kernels of each stage, (B, D², H, W), first to last, without the stages that
            ``first`` contains.
        first: Kernels of the joint bilateral stage and its learned stages; None if there is none.
        shrink: Their result is larger than the output by this factor, and is averaged down.
    """

    source_size: tuple[int, int]
    stages: tuple[Tensor, ...]
    first: JointKernels | None = None
    shrink: int = 1

    def check(self, source_size: tuple[int, int], *, joint_first: bool) -> None:
        """Checks the size of the features and the kind of stack.

        Args:
            source_size: Height and width of the features.
            joint_first: Whether the stack has a joint bilateral stage.

        Raises:
            ValueError: If the kernels are for another size or kind.
        """
        if source_size != self.source_size:
            raise ValueError(
                f"these kernels are for features of size {self.source_size}; "
                f"got {source_size}; compute kernels(guidance, {source_size})"
            )
        computed_with = self.first is not None
        if computed_with != joint_first and (computed_with or self.stages):
            raise ValueError(
                f"this stack has {'a' if joint_first else 'no'} joint bilateral stage, unlike the "
                "one that computed these kernels; compute them with this stack's own kernels()"
            )
