"""The ``cuda`` implementation: launches the fused kernels on torch's current stream.

No function waits for the device. The first comment of each ``.cu`` file defines layouts, grids and
outputs. Functions have the signatures of :mod:`featup_hub.ops.torch_backend`, and raise
:class:`UnavailableError`, with a remedy, if the kernels cannot compute with their arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops.cuda.programs import FusedKernels, Kernel, Program, UnavailableError, prepare
from featup_hub.ops.reference import MIN_WIDTH, StageWeights, cell_of_pixel
from featup_hub.ops.tables import bicubic_matrix, reflect

DIAMETER, TAPS, KEYS = 7, 49, 32
MOST_GUIDANCE_CHANNELS = 14
MOST_SAMPLES = 65535  # samples are an axis of the grid
CHANNEL_TILE = 128
BLOCKS_PER_MULTIPROCESSOR = 4
FEATURE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def kernel_program(channels: int) -> Program:
    """Returns the program that predicts kernels from ``channels`` guidance channels."""
    kernels = {
        "range_forward": Kernel(128, 128 * (KEYS + channels)),
        "kernel_forward": Kernel(256, 768 * (TAPS + channels)),
    }
    return Program("jbu_kernel.cu", f"JBU_GUIDANCE={channels}", kernels)


@functools.cache
def apply_program(dtype: torch.dtype) -> Program:
    """Returns the program that filters features of a dtype."""
    kernels = {"apply_forward_7": Kernel(128, 29840), "apply_forward_8": Kernel(128, 38704)}
    return Program("jbu_apply.cu", f"JBU_TYPE={FEATURE_TYPES[dtype]}", kernels)


@functools.cache
def apply_backward_program(dtype: torch.dtype) -> Program:
    """Returns the program with the adjoints of filtering features of a dtype."""
    kernels = {
        "fold_7": Kernel(256, 29840),
        "fold_8": Kernel(256, 38704),
        "apply_backward_source_7": Kernel(128, 25280),
        "apply_backward_source_8": Kernel(128, 41712),
        "apply_backward_kernel_7": Kernel(224, 29840),
        "apply_backward_kernel_8": Kernel(256, 38704),
    }
    return Program("jbu_apply_backward.cu", f"JBU_TYPE={FEATURE_TYPES[dtype]}", kernels)


def usual_programs() -> list[Program]:
    """Returns the programs for RGB images and features of any type, forward and backward."""
    filters = [make(t) for make in (apply_program, apply_backward_program) for t in FEATURE_TYPES]
    return [kernel_program(3), *filters]


def kernel(guidance: Tensor, weights: StageWeights) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_kernel`."""
    shape = (weights.diameter, weights.range_b0.shape[0])
    batch, channels, height, width = guidance.shape
    if shape != (DIAMETER, KEYS) or channels > MOST_GUIDANCE_CHANNELS:
        raise UnavailableError(
            f"the fused kernels are made for {DIAMETER}×{DIAMETER} taps, {KEYS} key "
            f"channels and at most {MOST_GUIDANCE_CHANNELS} guidance channels; got "
            f"{shape[0]}×{shape[0]}, {shape[1]} and {channels}; use impl='torch'"
        )
    fused = _prepared(kernel_program(channels), guidance, weights.range_w0)
    guidance, w = guidance.contiguous(), StageWeights(*(t.contiguous() for t in weights))
    output = guidance.new_empty(batch, height, width, TAPS)
    if output.numel():
        projection = guidance.new_empty(batch, KEYS, height, width)
        grid = (blocks(height * width, 128), batch, 1)
        layers = (w.range_w0, w.range_b0, w.range_w1, w.range_b1)
        fused.launch("range_forward", grid, guidance, *layers, projection, height * width)
        grid = (blocks(width, 32), blocks(height, 4), batch)
        layers = (w.fixup_w0, w.fixup_b0, w.fixup_w1, w.fixup_b1)
        maps = (guidance, projection, w.range_temp, w.sigma_spatial, *layers, output)
        fused.launch("kernel_forward", grid, *maps, height, width)
    return output.permute(0, 3, 1, 2)


def joint_kernel(
    query: Tensor,
    key: Tensor,
    spatial: Tensor,
    range: Tensor,
    cells: tuple[int, int],
    radius: int,
) -> Tensor:
    """See :func:`featup_hub.ops.reference.joint_kernel`.

    The gradient of :func:`apply` with respect to its kernels is the product of every pixel with its
    neighbours. These products give the distances, |q - k|² = |q|² - 2 q·k + |k|², and a softmax
    does not depend on |q|². What is not finite reaches a few pixels more than in the definition.
    """
    if 2 * radius + 1 != DIAMETER:
        raise UnavailableError(
            f"the fused kernels have a radius of {DIAMETER // 2}; got {radius}; use impl='torch'"
        )
    fused = _prepared(apply_backward_program(torch.float32), query, query)
    (batch, _, height, width), (h, w) = query.shape, key.shape[2:]
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    # What a capture records is computed at the replay, so it must not be cached.
    axis = _joint_axis.__wrapped__ if capturing else _joint_axis
    rows, down = axis(h, height, cells[0], query.device)
    columns, across = axis(w, width, cells[1], query.device)
    near, alike = (width.abs().clamp(min=MIN_WIDTH) for width in (spatial, range))
    asked, had = query / alike, key / alike
    # In four channels, because the kernel reads vectors of four.
    square = had.square().sum(1, keepdim=True) * -0.125
    had = torch.cat([had, square.expand(-1, 4, -1, -1)], 1)
    had = had.index_select(2, rows).index_select(3, columns)
    maps = _channels_last(had), _channels_last(F.pad(asked, (0, 0, 0, 0, 0, 4), value=1.0))
    logits = query.new_empty(batch, height, width, TAPS)
    if logits.numel():
        sizes = (height, width, height, width, had.shape[1])
        grid = (_cell_tiles(height, width), 1, batch)
        fused.launch("apply_backward_kernel_8", grid, *maps, logits, *sizes)
    slope = -0.5 / near.square()
    by_axis = logits.view(batch, height, width, DIAMETER, DIAMETER)
    by_axis.addcmul_(down[:, None, :, None], slope).addcmul_(across[:, None], slope)
    return logits.softmax(3).permute(0, 3, 1, 2)


@functools.lru_cache(64)
def _joint_axis(few: int, many: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns, along one axis, the cell of every pixel, and squared distances to its neighbours'.

    The distances, (many, 7), are in cells of a source of ``cells``.
    """
    pixel, taps = torch.arange(many, device=device), torch.arange(DIAMETER, device=device)
    cell = cell_of_pixel(few, many, pixel)
    place, of_cell = (pixel + 0.5) * cells / many, (cell + 0.5) * cells / few
    near = of_cell[reflect(pixel[:, None] + taps - DIAMETER // 2, many)]
    return cell, (place[:, None] - near).square()


def apply(source: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`featup_hub.ops.reference.jbu_apply`."""
    fused, maps, window = _fit(apply_program, source, kernel)
    batch, h, w, channels = maps.shape
    height, width = kernel.shape[-2:]
    output = maps.new_empty(batch, height, width, channels)
    if output.numel():
        bias = None if bias is None else bias.contiguous()
        tiles = _cell_tiles(height, width)
        span = _span(channels, tiles * batch, fused)
        grid = (tiles, blocks(channels, span), batch)
        inputs = (maps, _channels_last(kernel), bias, output)
        sizes = (h, w, height, width, channels, span)
        fused.launch(f"apply_forward_{window}", grid, *inputs, *sizes)
    return output.to(source.dtype).permute(0, 3, 1, 2)


def apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of source and kernel; an empty tensor if one is not needed."""
    fused, maps, window = _fit(apply_backward_program, source, kernel)
    grad_source, grad_kernel = source.new_empty(0), kernel.new_empty(0)
    if not grad.numel():
        return (
            torch.zeros_like(source) if need_source else grad_source,
            torch.zeros_like(kernel) if need_kernel else grad_kernel,
        )
    batch, h, w, channels = maps.shape
    height, width = kernel.shape[-2:]
    upstream = _channels_last(grad.to(maps.dtype))
    grid = (_cell_tiles(height, width), 1, batch)
    if need_source:
        cells = (blocks(height, 2), blocks(width, 2))
        folded = kernel.new_empty(batch, *cells, window**2, 4)
        sizes = (h, w, height, width)
        fused.launch(f"fold_{window}", grid, _channels_last(kernel), folded, *sizes)
        grad_maps = torch.empty_like(maps)
        tiles = blocks(w, 8) * blocks(h, 4)
        span = _span(channels, tiles * batch, fused)
        inputs = (upstream, folded, grad_maps, *sizes, channels, span)
        grid_source = (tiles, blocks(channels, span), batch)
        fused.launch(f"apply_backward_source_{window}", grid_source, *inputs)
        grad_source = _resize_backward(grad_maps, source)
    if need_kernel:
        grad_kernel = kernel.new_empty(batch, height, width, TAPS)
        outputs = (grad_kernel, h, w, height, width, channels)
        fused.launch(f"apply_backward_kernel_{window}", grid, maps, upstream, *outputs)
        grad_kernel = grad_kernel.permute(0, 3, 1, 2)
    return grad_source, grad_kernel


def _prepared(program: Program, maps: Tensor, parameters: Tensor) -> FusedKernels:
    """Returns a program's kernels, or raises UnavailableError if they cannot take these maps."""
    if parameters.dtype != torch.float32:
        raise UnavailableError(
            "the fused kernels sum in float32; got "
            f"{parameters.dtype}; convert to float32, or use impl='torch'"
        )
    if maps.shape[0] > MOST_SAMPLES:
        raise UnavailableError(
            f"the fused kernels take at most {MOST_SAMPLES} samples; got {maps.shape[0]}; "
            "split the batch, or use impl='torch'"
        )
    return prepare(program, maps.device)


def _fit(
    program: Callable[[torch.dtype], Program], source: Tensor, kernel: Tensor
) -> tuple[FusedKernels, Tensor, int]:
    """Returns the fused kernels, the source as they take it, and the width of their window.

    They take it channels last, (B, h, w, C). A source whose axes neither keep their size nor grow
    by 1.75 to 2 is resized first; in a stack only the first, smallest stage needs this.
    """
    if kernel.shape[1] != TAPS or source.dtype not in FEATURE_TYPES:
        raise UnavailableError(
            f"the fused kernels are made for {TAPS} taps and float32, float16 or bfloat16 "
            f"features; got {kernel.shape[1]} and {source.dtype}; use impl='torch'"
        )
    size = kernel.shape[-2:]
    axes = list(zip(source.shape[-2:], size, strict=True))
    fits = all(small == large or 7 * small <= 4 * large <= 8 * small for small, large in axes)
    fused = _prepared(program(source.dtype if fits else kernel.dtype), source, kernel)
    if not fits:
        source = F.interpolate(source.to(kernel.dtype), size, mode="bicubic", align_corners=False)
    return fused, _channels_last(source), 7 if all(2 * n == m for n, m in axes) else 8


def _resize_backward(grad: Tensor, source: Tensor) -> Tensor:
    """The adjoint of :func:`_fit`'s resizing, from (B, h, w, C) to the source's (B, C, h, w).

    Uses matrix products: torch's adjoint of bicubic resizing sums in no fixed order.
    """
    batch, height, width, channels = grad.shape
    h, w = source.shape[-2:]
    if (height, width) != (h, w):
        rows, columns = (_resizing(*sizes, grad.device) for sizes in ((h, height), (w, width)))
        grad = (rows.t() @ grad.view(batch, height, -1)).view(batch * h, width, channels)
        grad = (columns.t() @ grad).view(batch, h, w, channels)
    return grad.to(source.dtype).permute(0, 3, 1, 2)


@functools.lru_cache(64)  # on the device: a captured graph must not copy it
def _resizing(size_in: int, size_out: int, device: torch.device) -> Tensor:
    return bicubic_matrix(size_in, size_out).to(device, torch.float32)


def _span(channels: int, tiles: int, fused: FusedKernels) -> int:
    """Divides channels among blocks, so that few tiles still use the whole device."""
    chunks = blocks(channels, CHANNEL_TILE)
    wanted = blocks(BLOCKS_PER_MULTIPROCESSOR * fused.multiprocessors, tiles)
    return CHANNEL_TILE * blocks(chunks, min(wanted, chunks))


def blocks(count: int, size: int) -> int:
    """Returns the number of blocks of ``size`` that cover ``count``."""
    return -(-count // size)


def _cell_tiles(height: int, width: int) -> int:
    """Counts tiles of 8×4 cells of 2×2 output pixels."""
    return blocks(blocks(width, 2), 8) * blocks(blocks(height, 2), 4)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
