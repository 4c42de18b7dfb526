"""What the fused kernels compute beside what the definition says, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from featup_hub.ops import reference
from featup_hub.ops.cuda import backend
from featup_hub.ops.reference import StageWeights

Emulate = Callable[..., None]

# Largest error over largest value, in float32: some ten roundings of 6e-8 in sums of 49 terms, and
# exponentials that amplify those of their exponents.
TOLERANCE = 2e-6


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over largest value, NaN being the worst."""
    assert actual.shape == expected.shape
    largest = expected.abs().max().item()
    return (actual.double() - expected).abs().max().nan_to_num(float("inf")).item() / largest


def draw_weights(channels: int = 3, temperature: float = 0.3, sigma: float = 0.8) -> StageWeights:
    """Weights in float64, far from their initial values."""
    draw = partial(torch.randn, dtype=torch.float64)
    return StageWeights(
        range_temp=torch.tensor(temperature).double(),
        sigma_spatial=torch.tensor(sigma).double(),
        range_w0=draw(32, channels) * 0.5,
        range_b0=draw(32) * 0.3,
        range_w1=draw(32, 32) * 0.05,
        range_b1=draw(32) * 0.1,
        fixup_w0=draw(49, 49 + channels) * 0.2,
        fixup_b0=draw(49) * 0.5,
        fixup_w1=draw(49, 49) * 0.2,
        fixup_b1=draw(49) * 0.5,
    )


def single(weights: StageWeights) -> StageWeights:
    return StageWeights(*(tensor.detach().float() for tensor in weights))


def kernel_pair(guidance: Tensor, weights: StageWeights) -> tuple[Tensor, Tensor]:
    """The kernels of the fused form and of the definition in float64."""
    kernel = backend.kernel(guidance.float(), single(weights))
    return kernel, reference.jbu_kernel(guidance, weights)


def output_and_gradients(
    source: Tensor, kernel: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The filtered source with its gradients, likewise; features rounded to ``dtype`` before."""
    source = source.to(dtype).double()
    leaves = [source.requires_grad_(), kernel.clone().requires_grad_()]
    expected = reference.jbu_apply(*leaves, bias)
    grad = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    inputs = source.detach().to(dtype), kernel.float()
    output = backend.apply(*inputs, bias.float())
    fused = backend.apply_backward(grad, *inputs, True, True)
    names = ("output", "source", "kernel")
    return (
        dict(zip(names, (output, *fused), strict=True)),
        dict(zip(names, (expected.detach(), *gradients), strict=True)),
    )


def draw_maps(
    h: int, w: int, channels: int, batch: int = 1, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A source, kernels of twice its size or of ``size``, and a bias, in float64."""
    draw = partial(torch.randn, dtype=torch.float64)
    return (
        draw(batch, channels, h, w),
        draw(batch, 49, *(size or (2 * h, 2 * w))),
        draw(channels),
    )


def everything() -> list[Tensor]:
    """Every kernel's results on one input each, both scales."""
    torch.manual_seed(0)
    guidance = torch.randn(2, 3, 5, 37, dtype=torch.float64)
    kernel, _ = kernel_pair(guidance, draw_weights())
    doubled, _ = output_and_gradients(*draw_maps(5, 9, 20))
    same, _ = output_and_gradients(*draw_maps(9, 17, 20, size=(9, 17)))
    return [kernel, *doubled.values(), *same.values()]


def halves() -> list[Tensor]:
    """The same of half-precision features, on tensor cores where the device has any."""
    torch.manual_seed(0)
    sizes = {torch.bfloat16: (5, 9, 40), torch.float16: (6, 3, 8)}
    results = [output_and_gradients(*draw_maps(*size), dtype)[0] for dtype, size in sizes.items()]
    return [tensor for found in results for tensor in found.values()]
