"""The ``torch`` implementation: plain PyTorch on any device, with explicit backward passes.

Functions with the signatures that :mod:`featup_hub.ops.registration` calls. They take and return
maps as (B, C, H, W), in channels_last memory format, as the filters need.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import folded, reference
from featup_hub.ops.prediction import predict, predict_backward
from featup_hub.ops.reference import StageWeights

HUGE = 1e18  # the product of two smaller values is finite in float32

joint_kernel = reference.joint_kernel  # its maps are small


def kernel(guidance: Tensor, weights: StageWeights) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_kernel`."""
    return predict(guidance, weights).permute(0, 3, 1, 2)


def kernel_backward(
    grad: Tensor, guidance: Tensor, weights: StageWeights
) -> tuple[Tensor, StageWeights]:
    """Returns the gradients of the guidance and of the weights."""
    if not _moderate(guidance, grad):
        grad_guidance, *gradients = _by_definition(
            lambda guidance, *w: reference.jbu_kernel(guidance, StageWeights(*w)),
            grad,
            (guidance, *weights),
        )
        return grad_guidance, StageWeights(*gradients)
    return predict_backward(_channels_last(grad), guidance, weights)


def apply(source: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_apply`."""
    source_last, kernel_last = _channels_last(source), _channels_last(kernel)
    if _moderate(source_last, kernel_last):
        return folded.apply(source_last, kernel_last, bias).permute(0, 3, 1, 2)
    output = reference.jbu_apply(source.to(kernel.dtype), kernel, bias).to(source.dtype)
    return _channels_last(output).permute(0, 3, 1, 2)


def apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of source and kernel; an empty tensor if one is not needed."""
    upstream = _channels_last(grad)
    grad_source, grad_kernel = source.new_empty(0), kernel.new_empty(0)
    if not _moderate(upstream, source, kernel):
        maps = source.to(kernel.dtype), kernel
        grad_source, grad_kernel = _by_definition(reference.jbu_apply, grad, maps)
        return grad_source.to(source.dtype), grad_kernel
    if need_source:
        size = (source.shape[2], source.shape[3])
        grad_source = folded.source_gradient(upstream, _channels_last(kernel), size)
        grad_source = grad_source.to(source.dtype).permute(0, 3, 1, 2)
    if need_kernel:
        diameter = round(kernel.shape[1] ** 0.5)
        grad_kernel = folded.kernel_gradient(
            upstream, _channels_last(source), diameter, kernel.dtype
        ).permute(0, 3, 1, 2)
    return grad_source, grad_kernel


def joint_kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    spatial: Tensor,
    range: Tensor,
    cells: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of :func:`featup_hub.ops.reference.joint_kernel`'s tensors.

    dL is the gradient of the logits. The pixels' features q get Σ dL_t (k_t - q). The cells'
    features k, at the other end of each tap, get Σ dL_t (q - k). Both are filters with dL.
    """
    radius = round(grad.shape[1] ** 0.5) // 2
    if not _moderate(query, key, grad):
        definition = partial(reference.joint_kernel, cells=cells, radius=radius)
        return _by_definition(definition, grad, (query, key, spatial, range))
    kernel = reference.joint_kernel(query, key, spatial, range, cells, radius)
    inner = (grad * kernel).sum(1, keepdim=True)
    grad_logits = _channels_last((grad - inner) * kernel)
    asked, had = (
        _channels_last(x) for x in reference.joint_features(query, key, spatial, range, cells)
    )
    grad_asked = folded.apply(had, grad_logits) - asked * grad_logits.sum(3, keepdim=True)
    received = folded.source_gradient(
        F.pad(asked, (0, 1), value=1), grad_logits, (had.shape[1], had.shape[2])
    )
    grad_had = received[..., :-1] - had * received[..., -1:]
    # Positions are the first two channels. Features are positions and embeddings, divided by the
    # widths.
    total = (grad_asked * asked + grad_had * had).sum((0, 1, 2))
    of_spatial, of_range = (
        torch.where(width.abs() >= reference.MIN_WIDTH, -part.sum() / width, 0.0).to(width.dtype)
        for width, part in ((spatial, total[:2]), (range, total[2:]))
    )
    alike = range.abs().clamp(min=reference.MIN_WIDTH)
    grad_query, grad_pixels = grad_asked[..., 2:] / alike, grad_had[..., 2:] / alike
    rows, columns = (
        F.one_hot(reference.cell_of_pixel(few, many, key), few).to(key.dtype)
        for few, many in zip(key.shape[2:], query.shape[2:], strict=True)
    )
    grad_key = rows.t() @ grad_pixels.permute(0, 3, 1, 2) @ columns
    grad_query, grad_key = grad_query.permute(0, 3, 1, 2), _channels_last(grad_key)
    return grad_query, grad_key.permute(0, 3, 1, 2), of_spatial, of_range


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _moderate(*maps: Tensor) -> bool:
    """Whether folding equals the definition: no NaN, no infinity, no huge value.

    A window contains pixels that a tap does not read. Their weight is zero, but zero times NaN is
    NaN.
    """
    for x in maps:
        if x.numel() == 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            continue
        low, high = x.aminmax()
        if not (low > -HUGE and high < HUGE):
            return False
    return True


def _by_definition(function: Any, grad: Tensor, inputs: tuple[Tensor, ...]) -> Any:
    """Returns the gradients of a function of :mod:`featup_hub.ops.reference`, by autograd."""
    return torch.func.vjp(function, *inputs)[1](grad.to(inputs[-1].dtype))
