"""Upsamples big images in tiles: the same result in bounded memory.

A tile of the output needs a slightly larger tile of every stage before it. The overlap is exact:
per axis, each stage computes the pixels wanted and those around them that kernels reach, from only
the source pixels that bicubic interpolation reads. At the image's border a tile uses the border's
rule. At other edges the pixels that a cut makes wrong are cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from featup_hub.ops import Implementation, jbu_apply
from featup_hub.ops.jbu import check_floating, without_autocast
from featup_hub.ops.tables import bicubic
from featup_hub.upsamplers.head import FoldedHead, check_head
from featup_hub.upsamplers.jbu import JBUStack
from featup_hub.upsamplers.plan import reach_of_halved

__all__ = ["upsample_tiled"]

# Most bytes of a tile per output pixel: kernels and their prediction, in float32, of every stage.
# Then per channel: the resized source, its windows, the output.
KERNEL_BYTES, CHANNEL_BYTES = 1600, 24
CHANNELS = 64
SMALLEST = 16


@dataclass(frozen=True, kw_only=True)
class Span:
    """One axis of one stage, for one tile."""

    region: slice  # the pixels computed: those wanted and a margin around them
    source: slice  # the pixels of the stage's source that are read
    matrix: Tensor  # weights, (pixels computed, pixels of the source)
    inner: slice  # the pixels wanted, counted within ``region``


def upsample_tiled(
    upsampler: JBUStack | FoldedHead,
    source: Tensor,
    guidance: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    out: Tensor | None = None,
    max_bytes: int = 1 << 30,
    impl: Implementation = "auto",
) -> Tensor:
    """Upsamples features tile by tile, without gradients, equal to the whole up to rounding.

    Args:
        upsampler: The upsampler, in evaluation mode, alone or with a folded head.
        source: Features, (B, C, h, w).
        guidance: The image, normalised RGB, (B, 3, H, W).
        size: Height and width wanted, or the length of the short side; default: the guidance's.
        out: Where to write, ``(B, C, *size)``, such as ``torch.from_numpy`` of a memory map;
            default: new memory on the source's device. With a head, C counts its outputs.
        max_bytes: Working memory, without inputs, output and the joint bilateral stage. That stage,
            if there is one, is computed whole: about 2 kB for each of its pixels, and its features.
            At a ratio of 16 it has an eighth of the output's height and width.
        impl: Implementation, see :mod:`featup_hub.ops.jbu`.

    Returns:
        ``out``.

    Raises:
        ValueError: If the shapes do not match, the memory is too small for a tile, or the upsampler
            is in training mode.

    Example:
        >>> stack = JBUStack().eval()
        >>> source, image = torch.randn(1, 5, 4, 6), torch.randn(1, 3, 64, 90)
        >>> upsample_tiled(stack, source, image, max_bytes=4_000_000).shape
        torch.Size([1, 5, 64, 90])
    """
    head = None
    if isinstance(upsampler, FoldedHead):
        head = upsampler.head
        upsampler = upsampler.upsampler
    if not isinstance(upsampler, JBUStack):
        got = type(upsampler).__name__
        raise TypeError(f"tiles are for a JBUStack; got {got}; take model.upsampler of a model")
    if upsampler.training:
        raise ValueError("tiles are for inference; the upsampler is training; call eval()")
    upsampler.check(source, guidance)
    if head is not None:
        check_head(head, source.shape[1])
    with torch.no_grad():
        plan = upsampler.plan(guidance, (source.shape[2], source.shape[3]), size=size, impl=impl)
        source, bias = upsampler.before(source, head)
        source = upsampler.pass_first(source, plan.first, impl=impl)
        height, width = plan.size
        shape = (*source.shape[:2], height, width)
        if out is None:
            out = source.new_empty(shape)
        elif tuple(out.shape) != shape:
            raise ValueError(f"out must have the output's shape, {shape}; got {tuple(out.shape)}")
        elif isinstance(out, Tensor):
            check_floating(out, "out")
        side = _side(max_bytes, source.shape[1]) // (1 + plan.halved)
        margin = max(upsampler.radius, reach_of_halved(upsampler.radius) if plan.halved else 0)
        tiles = [(y, x) for y in _slices(height, side) for x in _slices(width, side)]
        for sample, (rows, columns) in product(range(shape[0]), tiles):
            one = slice(sample, sample + 1)
            stages = [(predict, image[one]) for predict, image in plan.stages]
            tile = out[one, :, rows, columns]
            _fill(tile, source[one], stages, (rows, columns), margin, impl, halved=plan.halved)
            if bias is not None:
                tile += bias[:, None, None].to(tile)
    return out


def _fill(
    tile: Tensor,
    source: Tensor,
    stages: Sequence[tuple[Callable[[Tensor], Tensor], Tensor]],
    wanted: tuple[slice, slice],
    margin: int,
    impl: Implementation,
    *,
    halved: bool,
) -> None:
    """Computes one tile of one sample, its channels in groups."""
    scales = [1] * (len(stages) - halved) + [2] * halved  # of an image to its stage's output
    sizes = [source.shape[2:]]
    for (_, image), scale in zip(stages, scales, strict=True):
        sizes.append(torch.Size(side // scale for side in image.shape[2:]))
    down = _spans([size[0] for size in sizes], wanted[0], margin, source)
    across = _spans([size[1] for size in sizes], wanted[1], margin, source)
    kernels = [
        predict(image[:, :, _enlarged(y.region, scale), _enlarged(x.region, scale)])
        for (predict, image), scale, y, x in zip(stages, scales, down, across, strict=True)
    ]
    first = (down[0].source, across[0].source) if stages else wanted
    for channels in _slices(source.shape[1], CHANNELS):
        features = source[:, channels, first[0], first[1]]
        for kernel, y, x in zip(kernels, down, across, strict=True):
            with without_autocast(features.device):
                wide = features.to(y.matrix.dtype)
                resized = (y.matrix @ wide @ x.matrix.t()).to(features.dtype)
            features = jbu_apply(resized, kernel, impl=impl)[:, :, y.inner, x.inner]
        tile[:, channels] = features


def _spans(sizes: list[int], wanted: slice, margin: int, like: Tensor) -> list[Span]:
    """Traces the wanted pixels from the last size back to the first."""
    spans: list[Span] = []
    dtype = torch.promote_types(like.dtype, torch.float32)
    for size_in, size_out in zip(sizes[-2::-1], sizes[:0:-1], strict=True):
        region = slice(max(wanted.start - margin, 0), min(wanted.stop + margin, size_out))
        inner = slice(wanted.start - region.start, wanted.stop - region.start)
        pixels, weights = (x[region] for x in bicubic(size_in, size_out, torch.float64))
        low, high = int(pixels.min()), int(pixels.max()) + 1
        matrix = torch.zeros(len(pixels), high - low, dtype=torch.float64)
        matrix = matrix.scatter_add_(1, pixels - low, weights).to(like.device, dtype)
        wanted = slice(low, high)
        spans.append(Span(region=region, source=wanted, matrix=matrix, inner=inner))
    return spans[::-1]


def _side(max_bytes: int, channels: int) -> int:
    """Returns the side of the largest tile that fits, including overlap."""
    per_pixel = KERNEL_BYTES + CHANNEL_BYTES * min(channels, CHANNELS)
    side = int((max(max_bytes, 0) / per_pixel) ** 0.5) - 2 * SMALLEST
    if side < SMALLEST:
        least = per_pixel * (3 * SMALLEST + 1) ** 2
        raise ValueError(f"a small tile needs {least:,} bytes; got max_bytes={max_bytes:,}")
    return side


def _enlarged(span: slice, factor: int) -> slice:
    return slice(factor * span.start, factor * span.stop)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))
