"""Plan of a stack's computation for an image: its arguments, sizes, stages and kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from featup_hub.ops.jbu import check_floating, without_autocast
from featup_hub.ops.tables import bicubic, reflect
from featup_hub.upsamplers.joint import JointKernels


def stage_sizes(
    source_size: tuple[int, int], output_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Plans the sizes from source to output.

    There are n = ceil(log2 of the larger ratio) stages. The last one makes the output, the one
    before it half of that (rounded up), and so on, never below the source: only the first, the
    cheapest, has another ratio than two.

    Example:
        >>> stage_sizes((14, 14), (224, 224))
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> stage_sizes((16, 16), (224, 224))  # patch 14: the first stage has ratio 1.75
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> stage_sizes((12, 15), (360, 480))  # stride 32 takes five stages
        [(23, 30), (45, 60), (90, 120), (180, 240), (360, 480)]
    """
    (h, w), (height, width) = source_size, output_size
    if h < 1 or w < 1:
        raise ValueError(f"a source has at least one row and one column; got {h}×{w}")
    if height < h or width < w:
        raise ValueError(
            f"the output must be at least as large as the source, {h}×{w}; "
            f"got {height}×{width}; resize features with torch.nn.functional.interpolate instead; "
            "if their channels are last, give source.movedim(-1, 1)"
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
    """Returns the height and width of the output: a size, a short side, or the image's own."""
    height, width = guidance.shape[-2:]
    if size is None:
        return height, width
    if isinstance(size, (int, Integral)):
        size, short = int(size), min(height, width)
        return (height * size + short // 2) // short, (width * size + short // 2) // short
    if not _is_pair(size):
        raise TypeError(f"size must be a number of pixels, or (height, width); got {size!r}")
    return size[0], size[1]


def _is_pair(size: object) -> bool:
    """Whether a size is two whole numbers, which may be symbolic."""
    is_sequence = isinstance(size, (tuple, list)) and len(size) == 2
    return is_sequence and all(hasattr(side, "__index__") for side in cast("list[Any]", size))


def plan_sizes(
    source_size: tuple[int, int],
    guidance: Tensor,
    size: int | tuple[int, int] | None,
    *,
    may_halve: bool,
) -> tuple[tuple[int, int], list[tuple[int, int]], bool]:
    """Returns the output's size, the sizes of the stages' images, and :attr:`JBUPlan.halved`.

    ``may_halve``: Whether an output of at most half the image's size gets one stage more.
    """
    check_floating(guidance, "guidance")
    if not _is_pair(source_size):
        raise TypeError(f"source_size must be (height, width), whole numbers; got {source_size!r}")
    size = output_size(guidance, size)
    small = size != tuple(source_size) and all(
        cells <= side <= whole // 2
        for cells, side, whole in zip(source_size, size, guidance.shape[-2:], strict=True)
    )
    halve = small and may_halve
    largest = (2 * size[0], 2 * size[1]) if halve else size
    return size, stage_sizes(source_size, largest), halve


@dataclass(frozen=True, kw_only=True)
class JBUPlan:
    """Plan of a stack's computation for an image."""

    size: tuple[int, int]  # height and width of the output
    first: JointKernels | None  # of the joint bilateral stage, which comes first, if there is one
    # Of each learned stage after it: what predicts kernels, and its guidance, (B, G, H, W).
    stages: Sequence[tuple[Callable[[Tensor], Tensor], Tensor]]
    halved: bool  # whether the last stage's image has twice the size of its output, see halved()


@dataclass(frozen=True, kw_only=True)
class JBUKernels:
    """All kernels of an image, for any number of feature maps of one size.

    Attributes:
        source_size: Height and width of the features that the kernels are for.
        stages: Kernels of each stage, (B, D², H, W), first to last, without the stages that
            ``first`` contains. The last stage of a small output has E² taps, see :func:`halved`.
        first: Kernels of the joint bilateral stage and its learned stages; None if there is none.
    """

    source_size: tuple[int, int]
    stages: tuple[Tensor, ...]
    first: JointKernels | None = None


def check_arguments(
    source: Tensor, guidance: Tensor, *, guidance_dim: int, feat_dim: int | None
) -> None:
    """Raises an error unless these are features for a stack, and their image."""
    check_floating(source, "source")
    check_floating(guidance, "guidance")
    if source.dim() == 3 and guidance.dim() == 4:
        raise ValueError(
            f"source must be features, (B, C, h, w); got tokens, {tuple(source.shape)}? Leave "
            "out class and register tokens, then tokens.transpose(1, 2).unflatten(2, (h, w))"
        )
    if guidance.dim() != 4 or guidance.shape[1] != guidance_dim:
        raise ValueError(
            f"guidance must be an image, (B, {guidance_dim}, H, W); "
            f"got {tuple(guidance.shape)}, were source and guidance swapped?"
        )
    if source.dim() != 4 or source.shape[0] != guidance.shape[0] or 0 in source.shape[1:]:
        raise ValueError(
            f"source must be features, (B, C, h, w), with the guidance's batch size "
            f"{guidance.shape[0]}; got {tuple(source.shape)}"
        )
    if feat_dim is not None and source.shape[1] != feat_dim:
        raise ValueError(
            f"this upsampler was made for {feat_dim} channels; got {source.shape[1]}; "
            "use JBUStack(feat_dim=None), whose stages fit any number"
        )


def check_kernels(kernels: JBUKernels, source: Tensor, *, joint_first: bool) -> None:
    """Raises an error unless these are kernels for such features and for such a stack."""
    if not isinstance(kernels, JBUKernels):
        raise TypeError(
            "kernels must come from kernels(guidance, source_size); got "
            f"{type(kernels).__name__}; call the upsampler for one image"
        )
    check_floating(source, "source")
    size = source.shape[-2:]
    if tuple(size) != kernels.source_size:
        raise ValueError(
            f"these kernels are for features of size {kernels.source_size}; "
            f"got {tuple(size)}; compute kernels(guidance, {tuple(size)})"
        )
    computed_with = kernels.first is not None
    if computed_with != joint_first and (computed_with or kernels.stages):
        raise ValueError(
            f"this stack has {'a' if joint_first else 'no'} joint bilateral stage, unlike the "
            "one that computed these kernels; compute them with this stack's own kernels()"
        )


def halved(kernel: Tensor) -> Tensor:
    """Combines kernels of a stage that doubles with averaging its output down by two.

    Both are linear, so the mean over four pixels of the stage's output is one kernel on its source,
    (B, D², 2H, 2W) -> (B, E², H, W). Filtering with it costs a quarter.
    """
    batch, taps, height, width = map(int, kernel.shape)  # tensors while torch.jit traces
    height, width, d = height // 2, width // 2, round(taps**0.5)
    rows, columns = (_halving(size, d, kernel) for size in (height, width))
    e = rows.shape[3]
    same = partial(torch.eye, dtype=kernel.dtype, device=kernel.device)
    # One product per column, then one per row, each with all taps of two neighbouring pixels.
    with without_autocast(kernel.device):
        across = torch.einsum("xjtf,sr->xjstrf", columns, same(d))
        down = torch.einsum("yise,gf->yisgef", rows, same(e))
        pairs = kernel.permute(0, 2, 3, 1).reshape(batch * 2 * height, width, 2 * taps)
        half = pairs.transpose(0, 1) @ across.reshape(width, 2 * taps, d * e)
        pairs = half.view(width, batch, height, 2 * d * e).permute(1, 2, 0, 3)
        return (pairs @ down.reshape(height, 2 * d * e, e * e)).permute(0, 3, 1, 2)


def reach_of_halved(radius: int) -> int:
    """Returns the radius of :func:`halved` kernels: half the taps', and bicubic interpolation's."""
    return radius // 2 + 2


def _halving(size: int, diameter: int, like: Tensor) -> Tensor:
    """Returns the share of each source pixel in half of a tap, (H, 2, D, E), along one axis.

    E source pixels are around an output pixel. A stage resizes to twice the size, mirrors, and
    filters; see :mod:`featup_hub.ops.tables`.
    """
    radius = diameter // 2
    reach = reach_of_halved(radius)
    # On the device: a captured graph must not copy. For a ratio of two float32 is exact.
    pixels, weights = bicubic(size, 2 * size, torch.float32, like.device)
    fine = torch.arange(2 * size, device=like.device)[:, None]
    taps = reflect(fine + torch.arange(-radius, radius + 1, device=like.device), 2 * size)
    offsets = pixels[taps] - fine[:, :, None] // 2  # (2H, D, 4)
    around = torch.arange(-reach, reach + 1, device=like.device)
    shares = (weights[taps] / 2)[..., None] * (offsets[..., None] == around)
    return shares.sum(2).unflatten(0, (-1, 2)).to(like)
