"""The ``torch`` implementation: any device, plain PyTorch, forward and written-out backward.

Functions with the signatures that :mod:`featup_hub.ops.registration` calls. They take and return
maps as (B, C, H, W), in channels_last memory format, which is how the filters work.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import folded, reference
from featup_hub.ops.prediction import predict, predict_backward
from featup_hub.ops.reference import StageWeights
from featup_hub.ops.tables import bicubic_matrix

__all__ = ["apply", "apply_backward", "joint_kernel_backward", "kernel", "kernel_backward"]


def kernel(guidance: Tensor, weights: StageWeights) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_kernel`."""
    return predict(guidance, weights).permute(0, 3, 1, 2)


def kernel_backward(
    grad: Tensor, guidance: Tensor, weights: StageWeights
) -> tuple[Tensor, StageWeights]:
    """Returns the gradients of the guidance and of the weights."""
    return predict_backward(_channels_last(grad), guidance, weights)


def apply(source: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_apply`."""
    source = _to_scale(source, kernel)
    output = folded.apply(_channels_last(source), _channels_last(kernel), bias)
    return output.permute(0, 3, 1, 2)


def apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of source and kernel; empty tensors where they are not needed."""
    upstream, scaled = _channels_last(grad), _to_scale(source, kernel)
    grad_source, grad_kernel = grad.new_empty(0), kernel.new_empty(0)
    if need_source:
        size = (scaled.shape[2], scaled.shape[3])
        grad_source = folded.source_gradient(upstream, _channels_last(kernel), size)
        grad_source = _from_scale(grad_source, source).to(source.dtype)
        grad_source = _channels_last(grad_source).permute(0, 3, 1, 2)
    if need_kernel:
        diameter = round(kernel.shape[1] ** 0.5)
        grad_kernel = folded.kernel_gradient(
            upstream, _channels_last(scaled), diameter, kernel.dtype
        ).permute(0, 3, 1, 2)
    return grad_source, grad_kernel


def joint_kernel_backward(grad: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of query and key of :func:`featup_hub.ops.reference.joint_kernel`.

    With dL the gradient of the logits, dq = Σ dL_t (k_t - q) and, at the other end of each tap,
    dk = Σ dL_t (q - k): both are filters with dL and their adjoints.
    """
    kernel = reference.joint_kernel(query, key, round(grad.shape[1] ** 0.5) // 2)
    inner = (grad * kernel).sum(1, keepdim=True)
    grad_logits = _channels_last((grad - inner) * kernel)
    query, key = _channels_last(query), _channels_last(key)
    grad_query = folded.apply(key, grad_logits) - query * grad_logits.sum(3, keepdim=True)
    asked = F.pad(query, (0, 1), value=1)
    received = folded.source_gradient(asked, grad_logits, (key.shape[1], key.shape[2]))
    grad_key = received[..., :-1] - key * received[..., -1:]
    return grad_query.permute(0, 3, 1, 2), grad_key.permute(0, 3, 1, 2)


def _to_scale(source: Tensor, kernel: Tensor) -> Tensor:
    """Resizes a source that is neither the kernels' size nor half of it."""
    height, width = kernel.shape[-2:]
    h, w = source.shape[-2:]
    if (height, width) in ((h, w), (2 * h, 2 * w)):
        return source
    return F.interpolate(source, (height, width), mode="bicubic", align_corners=False)


def _from_scale(grad: Tensor, source: Tensor) -> Tensor:
    """The adjoint of :func:`_to_scale`, from (B, H, W, C) to (B, C, h, w)."""
    grad = grad.permute(0, 3, 1, 2)
    (h, w), (height, width) = source.shape[-2:], grad.shape[-2:]
    if (height, width) == (h, w):
        return grad
    rows, columns = bicubic_matrix(h, height).to(grad), bicubic_matrix(w, width).to(grad)
    return rows.t() @ grad @ columns


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
