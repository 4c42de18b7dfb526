r"""Predicts kernels from guidance, in bands and without autograd's copies.

The formula of :func:`featup_hub.ops.reference.jbu_kernel` with two savings. The logits of taps t
and -t are the same products, shifted, so only 25 of 49 are computed. Temporaries exist for one band
of rows only. The backward pass recomputes a band and applies an explicit adjoint:

* correction: :math:`dk = g + W_0^\top(\mathrm{gelu}'(a) \circ 0.1\, W_1^\top g)`
* softmax times spatial term: :math:`dL_t = k_t (dk_t - \sum dk\, k)`
* logits: :math:`L_t(u) = T \langle p(u), \bar p(u + t) \rangle` has two gradients: a filter of p
  with dL, and its adjoint. Both are :mod:`featup_hub.ops.folded` at scale one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import folded
from featup_hub.ops.memory import new_map, temporary_elements
from featup_hub.ops.reference import (
    FIXUP_SCALE,
    MAX_TEMPERATURE,
    MIN_SUM,
    MIN_TEMPERATURE,
    StageWeights,
    reflect_pad,
    spatial_logits,
)


def predict(guidance: Tensor, weights: StageWeights) -> Tensor:
    """Predicts kernels, channels last, (B, H, W, D²), from (B, G, H, W) in the weights' dtype."""
    batch, _, height, width = guidance.shape
    taps = weights.fixup_w1.shape[0]
    padded = reflect_pad(guidance, weights.radius)
    output = new_map(guidance, batch, height, width, taps)
    for first, count in _bands(batch, height, width, weights):
        keys, _ = _project(padded[:, :, first : first + count + 2 * weights.radius], weights)
        logits = _logits(keys, weights)
        kernel, _, _ = _normalise(logits, weights)
        fixup_in = _with_guidance(kernel, guidance, first, count)
        hidden = F.gelu(torch.addmm(weights.fixup_b0, fixup_in, weights.fixup_w0.t()))
        kernel.add_(weights.fixup_b1, alpha=FIXUP_SCALE)
        kernel.addmm_(hidden, weights.fixup_w1.t(), alpha=FIXUP_SCALE)
        output[:, first : first + count] = kernel.view(batch, count, width, taps)
    return output


def predict_backward(
    grad: Tensor, guidance: Tensor, weights: StageWeights
) -> tuple[Tensor, StageWeights]:
    """The adjoint of :func:`predict`: the gradients of the guidance and of the weights."""
    batch, channels, height, width = guidance.shape
    w, taps = weights, weights.fixup_w1.shape[0]
    projection, hidden_in = _project(guidance, w)
    padded = reflect_pad(projection, w.radius)
    total = StageWeights(*(torch.zeros_like(tensor) for tensor in w))
    grad_guidance = torch.empty_like(guidance, memory_format=torch.contiguous_format)
    grad_logits = new_map(grad, *grad.shape)
    grad_spatial = w.fixup_b1.new_zeros(taps)

    for first, count in _bands(batch, height, width, w):
        rows = slice(first, first + count)
        logits = _logits(padded[:, :, first : first + count + 2 * w.radius], w)
        kernel, softmax, total_weight = _normalise(logits, w)
        fixup_in = _with_guidance(kernel, guidance, first, count)
        before = torch.addmm(w.fixup_b0, fixup_in, w.fixup_w0.t())
        upstream = grad[:, rows].reshape(-1, taps)

        total.fixup_w1.addmm_(upstream.t(), F.gelu(before), alpha=FIXUP_SCALE)
        total.fixup_b1.add_(upstream.sum(0), alpha=FIXUP_SCALE)
        grad_hidden = (upstream @ w.fixup_w1).mul_(FIXUP_SCALE)
        grad_before = torch.ops.aten.gelu_backward(grad_hidden, before)
        total.fixup_w0.addmm_(grad_before.t(), fixup_in)
        total.fixup_b0.add_(grad_before.sum(0))
        grad_in = grad_before @ w.fixup_w0
        grad_guidance[:, :, rows] = (
            grad_in[:, taps:].view(batch, count, width, channels).permute(0, 3, 1, 2)
        )

        weighted = (grad_in[:, :taps] + upstream).mul_(kernel)  # dk · k
        inner = weighted.sum(1, keepdim=True)
        clamped = total_weight < MIN_SUM
        normaliser = inner * ~clamped
        grad_spatial += (weighted - normaliser * kernel).sum(0)
        weighted -= inner * torch.where(clamped, softmax, kernel)
        total.range_temp.add_((weighted * logits).sum())
        grad_logits[:, rows] = weighted.view(batch, count, width, taps)

    temperature = w.range_temp.exp()
    total.range_temp.mul_((temperature >= MIN_TEMPERATURE) & (temperature <= MAX_TEMPERATURE))
    slope = -2 * spatial_logits(w.sigma_spatial, w.diameter) / w.sigma_spatial
    total.sigma_spatial.add_((grad_spatial * slope).sum())
    _project_backward(grad_logits, guidance, projection, hidden_in, w, total, grad_guidance)
    return grad_guidance, total


def _project(guidance: Tensor, weights: StageWeights) -> tuple[Tensor, Tensor]:
    """Returns the range projection, (B, K, H, W), and its hidden layer before the GELU."""
    hidden = F.conv2d(guidance, weights.range_w0[:, :, None, None], weights.range_b0)
    return F.conv2d(F.gelu(hidden), weights.range_w1[:, :, None, None], weights.range_b1), hidden


def _project_backward(
    grad_logits: Tensor,
    guidance: Tensor,
    projection: Tensor,
    hidden: Tensor,
    weights: StageWeights,
    total: StageWeights,
    grad_guidance: Tensor,
) -> None:
    """Propagates the logits' gradient to the range projection; adds to the totals in place."""
    channels_last = projection.permute(0, 2, 3, 1).contiguous()
    size = (projection.shape[2], projection.shape[3])
    grad = folded.apply(channels_last, grad_logits)  # the pixel at the kernel's centre ...
    grad += folded.source_gradient(channels_last, grad_logits, size)  # ... and its neighbours
    grad *= _temperature(weights)
    flat = grad.reshape(-1, grad.shape[-1])
    before = hidden.permute(0, 2, 3, 1).reshape(flat.shape)
    total.range_w1.addmm_(flat.t(), F.gelu(before))
    total.range_b1.add_(flat.sum(0))
    grad_before = torch.ops.aten.gelu_backward(flat @ weights.range_w1, before)
    pixels = guidance.permute(0, 2, 3, 1).reshape(flat.shape[0], -1)
    total.range_w0.addmm_(grad_before.t(), pixels)
    total.range_b0.add_(grad_before.sum(0))
    grad_pixels = (grad_before @ weights.range_w0).view(*grad.shape[:3], -1)
    grad_guidance += grad_pixels.permute(0, 3, 1, 2)


def _temperature(weights: StageWeights) -> Tensor:
    return weights.range_temp.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)


def _logits(band: Tensor, weights: StageWeights) -> Tensor:
    """Returns the logits, (B·H·W, D²), from a padded band of keys, (B, K, H + 2r, W + 2r)."""
    d, r = weights.diameter, weights.radius
    count, width = band.shape[2] - 2 * r, band.shape[3] - 2 * r
    logits = band.new_empty(band.shape[0], d * d, count, width)
    for tap in range(d * d // 2, d * d):
        dy, dx = tap // d - r, tap % d - r  # dy >= 0
        left, right = min(r, r - dx), max(r, r - dx) + width
        near = band[:, :, r - dy : r + count, left:right]
        far = band[:, :, r : r + count + dy, left + dx : right + dx]
        product = (near * far).sum(1)
        logits[:, tap] = product[:, dy:, r - left :][..., :width]
        logits[:, d * d - 1 - tap] = product[:, :count, r - dx - left :][..., :width]
    logits *= _temperature(weights)
    return logits.permute(0, 2, 3, 1).reshape(-1, d * d)


def _normalise(logits: Tensor, weights: StageWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Returns kernels before correction, the plain softmax, and its spatially weighted sum."""
    softmax = torch.softmax(logits, 1)
    kernel = softmax * spatial_logits(weights.sigma_spatial, weights.diameter).exp()
    total = kernel.sum(1, keepdim=True)
    return kernel.div_(total.clamp(min=MIN_SUM)), softmax, total


def _with_guidance(kernel: Tensor, guidance: Tensor, first: int, count: int) -> Tensor:
    pixels = guidance[:, :, first : first + count].permute(0, 2, 3, 1)
    return torch.cat([kernel, pixels.reshape(kernel.shape[0], -1)], 1)


def _bands(batch: int, height: int, width: int, weights: StageWeights) -> Iterator[tuple[int, int]]:
    widest = max(weights.fixup_w0.shape[1], weights.range_b0.shape[0])
    elements = temporary_elements(weights.fixup_w0.device)
    count = max(1, min(height, elements // (batch * width * widest)))
    for first in range(0, height, count):
        yield first, min(count, height - first)
