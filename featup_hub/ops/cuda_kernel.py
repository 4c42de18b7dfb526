"""Launches ``jbu_kernel.cu``, ``jbu_kernel_backward.cu`` and ``jbu_range_backward.cu``.

Kernels from guidance, and the two halves of the adjoint.

The comments that open the ``.cu`` files are the contract kept here: layouts, grids, what is
written.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from featup_hub.ops.fused import FusedKernels, Kernel, Program, blocks, obstacle, prepare
from featup_hub.ops.reference import StageWeights

__all__ = [
    "kernel",
    "kernel_backward",
    "kernel_backward_program",
    "kernel_obstacle",
    "kernel_program",
    "range_backward_program",
]

DIAMETER, TAPS, KEYS = 7, 49, 32
MOST_GUIDANCE_CHANNELS = 14
MOST_PARTIAL_SUMS = 256


@functools.cache
def kernel_program(channels: int) -> Program:
    """Returns the program that predicts kernels from ``channels`` guidance channels."""
    kernels = {
        "range_forward": Kernel("PPPPPPi", 128),
        "kernel_forward": Kernel("PPPPPPPPPii", 112, 528 * (TAPS + channels)),
    }
    return Program("jbu_kernel.cu", f"JBU_GUIDANCE={channels}", kernels)


@functools.cache
def kernel_backward_program(channels: int) -> Program:
    """Returns the program with the adjoint of that, down to the logits."""
    kernels = {
        "kernel_backward": Kernel("PPPPPPPPPPPiii", 112, 272 * (149 + channels)),
        "sum_partials": Kernel("PPii", 256, 1024),
    }
    return Program("jbu_kernel_backward.cu", f"JBU_GUIDANCE={channels}", kernels)


@functools.cache
def range_backward_program(channels: int) -> Program:
    """Returns the program with the rest of the adjoint, from the logits to the guidance."""
    kernels = {
        "projection_backward": Kernel("PPPPii", 128),
        "range_backward": Kernel("PPPPPPPii", 128, 272 * (98 + channels)),
    }
    return Program("jbu_range_backward.cu", f"JBU_GUIDANCE={channels}", kernels)


def kernel_obstacle(guidance: Tensor, weights: StageWeights) -> str | None:
    """Says why the fused kernels cannot compute this :func:`kernel`, and what would help."""
    shape = (weights.diameter, weights.range_b0.shape[0])
    if shape != (DIAMETER, KEYS) or guidance.shape[1] > MOST_GUIDANCE_CHANNELS:
        return (
            f"the fused kernels are made for {DIAMETER}×{DIAMETER} taps, {KEYS} key "
            f"channels and at most {MOST_GUIDANCE_CHANNELS} guidance channels; got "
            f"{shape[0]}×{shape[0]}, {shape[1]} and {guidance.shape[1]}; use impl='torch'"
        )
    return obstacle(kernel_program(guidance.shape[1]), guidance, guidance)


def kernel(guidance: Tensor, weights: StageWeights) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_kernel`."""
    batch, channels, height, width = guidance.shape
    guidance, w = guidance.contiguous(), _contiguous(weights)
    output = guidance.new_empty(batch, height, width, TAPS)
    if output.numel():
        fused = prepare(kernel_program(channels), guidance.device)
        projection = _project(fused, guidance, w)
        grid = (blocks(width, 32), blocks(height, 4), batch)
        layers = (w.fixup_w0, w.fixup_b0, w.fixup_w1, w.fixup_b1)
        maps = (guidance, projection, w.range_temp, w.sigma_spatial, *layers, output)
        fused.launch("kernel_forward", grid, *maps, height, width)
    return output.permute(0, 3, 1, 2)


def kernel_backward(
    grad: Tensor, guidance: Tensor, weights: StageWeights
) -> tuple[Tensor, StageWeights]:
    """Returns the gradients of the guidance and of the weights."""
    batch, channels, height, width = guidance.shape
    guidance, w = guidance.contiguous(), _contiguous(weights)
    if not guidance.numel():
        return torch.zeros_like(guidance), StageWeights(*map(torch.zeros_like, w))
    fused = prepare(kernel_backward_program(channels), guidance.device)
    ranging = prepare(range_backward_program(channels), guidance.device)
    grad = grad.permute(0, 2, 3, 1).contiguous()
    projection = _project(prepare(kernel_program(channels), guidance.device), guidance, w)
    tiles = (blocks(width, 32), blocks(height, 4), batch)
    parts = min(MOST_PARTIAL_SUMS, batch * blocks(height, 2) * tiles[0])
    grad_guidance = torch.empty_like(guidance)
    grad_projection = torch.empty_like(projection)
    grad_logits = guidance.new_empty(batch, TAPS, height, width)
    fixup_inputs, range_inputs = (TAPS + channels + 1, TAPS + 1), (channels + 1, KEYS + 1)
    fixup = guidance.new_empty(parts, TAPS * sum(fixup_inputs) + 2)
    ranges = guidance.new_empty(parts, KEYS * sum(range_inputs))

    inputs = (guidance, projection, w.range_temp, w.sigma_spatial)
    layers = (w.fixup_w0, w.fixup_b0, w.fixup_w1)
    outputs: tuple[Tensor, ...] = (grad_logits, grad_guidance, fixup)
    grid = (parts, 1, 1)
    fused.launch("kernel_backward", grid, *inputs, *layers, grad, *outputs, batch, height, width)
    inputs = (projection, w.range_temp, grad_logits, grad_projection)
    ranging.launch("projection_backward", tiles, *inputs, height, width)
    inputs = (guidance, w.range_w0, w.range_b0, w.range_w1)
    outputs = (grad_projection, grad_guidance, ranges)
    ranging.launch("range_backward", grid, *inputs, *outputs, height * width, batch)
    fixup_in, fixup_out, (sigma, temperature) = _sum(fused, fixup, TAPS, *fixup_inputs)
    range_in, range_out, _ = _sum(fused, ranges, KEYS, *range_inputs)
    return grad_guidance, StageWeights(
        range_temp=temperature.clone(),
        sigma_spatial=sigma.clone(),
        range_w0=range_in[:, :-1].contiguous(),
        range_b0=range_in[:, -1].contiguous(),
        range_w1=range_out[:, :-1].contiguous(),
        range_b1=range_out[:, -1].contiguous(),
        fixup_w0=fixup_in[:, :-1].contiguous(),
        fixup_b0=fixup_in[:, -1].contiguous(),
        fixup_w1=fixup_out[:, :-1].contiguous(),
        fixup_b1=fixup_out[:, -1].contiguous(),
    )


def _project(fused: FusedKernels, guidance: Tensor, w: StageWeights) -> Tensor:
    """Returns the range projection, (B, K, H, W)."""
    batch, _, height, width = guidance.shape
    projection = guidance.new_empty(batch, KEYS, height, width)
    grid = (blocks(height * width, 512), batch, 1)
    layers = (w.range_w0, w.range_b0, w.range_w1, w.range_b1)
    fused.launch("range_forward", grid, guidance, *layers, projection, height * width)
    return projection


def _sum(
    fused: FusedKernels, partial: Tensor, rows: int, first: int, second: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds up what the blocks found, always in the same order.

    Args:
        fused: The kernels.
        partial: (blocks, N), each row two layers' gradients and what else there is.
        rows: Outputs of either layer.
        first: Inputs of the first layer, its bias counted in.
        second: Those of the second.

    Returns:
        (rows, first), (rows, second) and the rest.
    """
    parts, count = partial.shape
    total = partial.new_empty(count)
    fused.launch("sum_partials", (blocks(count, 32), 1, 1), partial, total, parts, count)
    one, two, rest = total.split((rows * first, rows * second, count - rows * (first + second)))
    return one.view(rows, first), two.view(rows, second), rest


def _contiguous(weights: StageWeights) -> StageWeights:
    return StageWeights(*(tensor.contiguous() for tensor in weights))
