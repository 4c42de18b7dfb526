"""The fused kernels against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from featup_hub.ops import reference
from featup_hub.ops.cuda import backend
from featup_hub.ops.reference import StageWeights
from tests.ops.cuda.emulator import Emulator

Emulate = Callable[..., None]

# Largest error over largest value, in float32: some ten roundings of 6e-8 in sums of 49 terms, and
# exponentials that amplify those of their exponents.
TOLERANCE = 2e-6
# With corrections on tensor cores: there, sums are cut by up to 2^-23, 21 times a layer.
TENSOR_TOLERANCE = 5e-6
ARCHITECTURES = (90, 75)  # with tensor cores and without


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


def joint_pair(
    size: tuple[int, int], cells: tuple[int, int], source: tuple[int, int], batch: int = 1
) -> tuple[Tensor, Tensor]:
    """The joint kernels of both forms; embeddings have about length one, as those of colours."""
    draw = partial(torch.randn, dtype=torch.float64)
    query, key = draw(batch, 32, *size) / 6, draw(batch, 32, *cells) / 6
    arguments = query, key, torch.tensor(1.25).double(), torch.tensor(-0.17).double()
    joint = backend.joint_kernel(*(x.float() for x in arguments), source, 3)
    return joint, reference.joint_kernel(*arguments, source, 3)


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


def everything() -> Iterator[Tensor]:
    """Every kernel's results on one input each, both scales, computed as they are asked for."""
    torch.manual_seed(0)
    guidance = torch.randn(2, 3, 5, 37, dtype=torch.float64)
    weights = draw_weights()
    yield kernel_pair(guidance, weights)[0]
    weights.fixup_w1[7, 3] = float("inf")
    yield kernel_pair(guidance[:1, :, :4], weights)[0].nan_to_num(7.0)
    for maps in (draw_maps(5, 9, 20), draw_maps(9, 17, 20, size=(9, 17))):
        yield from output_and_gradients(*maps)[0].values()
    yield joint_pair((6, 19), (3, 10), (3, 10))[0]
    source, kernel, bias = (x.float() for x in draw_maps(3, 5, 132))
    source[0, 130, 1, 2] = float("inf")
    yield backend.apply(source, kernel, bias).nan_to_num(7.0)


def halves() -> Iterator[Tensor]:
    """The same of half-precision features, on tensor cores where the device has any."""
    torch.manual_seed(0)
    for dtype, size in {torch.bfloat16: (5, 9, 40), torch.float16: (6, 3, 8)}.items():
        yield from output_and_gradients(*draw_maps(*size), dtype)[0].values()


def far_sample(emulator: Emulator) -> tuple[float, float]:
    """Errors of both operations in the last sample of a batch of more than 2^31 numbers.

    Only that sample is written and computed: untouched memory costs nothing.
    """
    torch.manual_seed(0)
    batch, size, channels = 44_000, 32, 4
    weights, device = single(draw_weights()), torch.device("cpu")
    image = torch.empty(batch, 3, size, size)
    image[-1] = torch.randn(3, size, size)
    projection = torch.empty(batch, 32, size, size)
    kernel = torch.empty(batch, size, size, 49)
    assert kernel.numel() > 2**31
    predict = emulator.prepare(backend.kernel_program(3), device)
    layers = [weights.range_w0, weights.range_b0, weights.range_w1, weights.range_b1]
    arguments = [image, *layers, projection, size**2]
    for x in range(8):
        block = (x, batch - 1, 0)
        predict.launch_bare("range_forward", (8, batch, 1), arguments, block=block)
    layers = [weights.fixup_w0, weights.fixup_b0, weights.fixup_w1, weights.fixup_b1]
    numbers = [weights.range_temp, weights.sigma_spatial]
    arguments = [image, projection, *numbers, *layers, kernel, size, size]
    for y in range(8):
        block = (0, y, batch - 1)
        predict.launch_bare("kernel_forward", (1, 8, batch), arguments, block=block)
    double = StageWeights(*(w.double() for w in weights))
    exact = reference.jbu_kernel(image[-1:].double(), double)

    source = torch.empty(batch, size // 2, size // 2, channels)
    source[-1] = torch.randn(size // 2, size // 2, channels)
    output = torch.empty(batch, size, size, channels)
    filters = emulator.prepare(backend.apply_program(torch.float32), device)
    arguments = [source, kernel, None, output, *[size // 2] * 2, size, size, channels, 128]
    for tile in range(8):
        block = (tile, 0, batch - 1)
        filters.launch_bare("apply_forward_7", (8, 1, batch), arguments, block=block)
    filtered = reference.jbu_apply(source[-1:].permute(0, 3, 1, 2).double(), exact)
    return (
        error(kernel[-1:].permute(0, 3, 1, 2), exact),
        error(output[-1:].permute(0, 3, 1, 2), filtered),
    )
