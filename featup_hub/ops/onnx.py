"""The operators of this package in ONNX, for graphs of any size.

A graph of the definition has thousands of nodes with symbolic sizes, which take minutes to trace.
Here an operator is traced whole, and these functions write its nodes. They follow
:mod:`featup_hub.ops.reference`; see there for formulas and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import onnxscript
import torch
from onnxscript import ir

from featup_hub.ops import reference

__all__ = ["TRANSLATIONS"]

op: Any = onnxscript.opset18  # its type hints allow no Python constants

_LAST = 2**63 - 1  # the end of an axis


def pool_guidance(image: Any, height: Any, width: Any) -> Any:
    size = op.Shape(image)
    rows = _pooling_matrix(_entry(size, 2), height, image)
    columns = _pooling_matrix(_entry(size, 3), width, image)
    return op.MatMul(op.MatMul(rows, image), op.Transpose(columns, perm=[1, 0]))


def jbu_kernel(
    guidance: Any,
    range_temp: Any,
    sigma_spatial: Any,
    range_w0: Any,
    range_b0: Any,
    range_w1: Any,
    range_b1: Any,
    fixup_w0: Any,
    fixup_b0: Any,
    fixup_w1: Any,
    fixup_b1: Any,
    impl: str = "auto",
) -> Any:
    diameter = _diameter(fixup_b1.shape[0])
    number = partial(ir.tensor, dtype=guidance.dtype)
    hidden = _gelu(_convolve(guidance, range_w0, range_b0), number)
    keys = _convolve(hidden, range_w1, range_b1)
    logits = [
        op.ReduceSum(op.Mul(keys, near), [1], keepdims=1) for near in _neighbours(keys, diameter)
    ]
    temperature = op.Clip(
        op.Exp(range_temp), number(reference.MIN_TEMPERATURE), number(reference.MAX_TEMPERATURE)
    )
    kernel = op.Softmax(op.Mul(temperature, op.Concat(*logits, axis=1)), axis=1)
    # For a width of one; the logits are proportional to 1 / σ².
    squares = reference.spatial_logits(torch.tensor(1.0), diameter)[:, None, None]
    spatial = op.Exp(op.Div(number(squares.tolist()), op.Mul(sigma_spatial, sigma_spatial)))
    kernel = op.Mul(kernel, spatial)
    total = op.ReduceSum(kernel, [1], keepdims=1)
    kernel = op.Div(kernel, op.Clip(total, number(reference.MIN_SUM)))
    hidden = _gelu(_convolve(op.Concat(kernel, guidance, axis=1), fixup_w0, fixup_b0), number)
    correction = _convolve(hidden, fixup_w1, fixup_b1)
    return op.Add(kernel, op.Mul(correction, number(reference.FIXUP_SCALE)))


def joint_kernel(
    query: Any,
    key: Any,
    spatial: Any,
    range: Any,
    rows: Any,
    columns: Any,
    radius: int,
    impl: str,
) -> Any:
    number = partial(ir.tensor, dtype=query.dtype)
    widths = [op.Clip(op.Abs(width), number(reference.MIN_WIDTH)) for width in (spatial, range)]
    asked, had = (
        op.Concat(op.Div(_places(x, (rows, columns)), widths[0]), op.Div(x, widths[1]), axis=1)
        for x in (query, key)
    )
    had = _repeat(had, op.Shape(query))
    diameter = 2 * radius + 1
    distances = [
        op.ReduceSumSquare(op.Sub(asked, near), [1], keepdims=1)
        for near in _neighbours(had, diameter)
    ]
    logits = op.Mul(op.Concat(*distances, axis=1), number(-0.5))
    return op.Softmax(logits, axis=1)


def jbu_apply(source: Any, kernel: Any, bias: Any = None, impl: str = "auto") -> Any:
    diameter = _diameter(kernel.shape[1])
    size = op.Concat(op.Shape(source, end=2), op.Shape(kernel, start=2), axis=0)
    resized = op.Resize(
        op.Cast(source, to=kernel.dtype),
        None,
        None,
        size,
        mode="cubic",
        cubic_coeff_a=-0.75,
        coordinate_transformation_mode="half_pixel",
    )
    output = bias if bias is None else op.Unsqueeze(bias, [1, 2])
    for tap, near in enumerate(_neighbours(resized, diameter)):
        product = op.Mul(op.Slice(kernel, [tap], [tap + 1], [1]), near)
        output = product if output is None else op.Add(output, product)
    return op.Cast(output, to=source.dtype)


def _entry(size: Any, axis: int) -> Any:
    return op.Gather(size, axis, axis=0)


def _diameter(taps: int) -> int:
    return round(taps**0.5)


def _gelu(x: Any, number: Callable[[float], Any]) -> Any:
    error = op.Erf(op.Div(x, number(math.sqrt(2))))
    return op.Mul(op.Mul(number(0.5), x), op.Add(number(1.0), error))


def _convolve(x: Any, weight: Any, bias: Any) -> Any:
    return op.Conv(x, op.Unsqueeze(weight, [2, 3]), bias)


def _pooling_matrix(size_in: Any, size_out: Any, like: Any) -> Any:
    out, column = op.Range(0, size_out, 1), op.Range(0, size_in, 1)
    start = op.Div(op.Mul(out, size_in), size_out)
    end = op.Mul(op.Add(out, 1), size_in)
    stop = op.Div(op.Add(end, op.Sub(size_out, 1)), size_out)
    inside = op.And(
        op.GreaterOrEqual(column, op.Unsqueeze(start, [1])),
        op.Less(column, op.Unsqueeze(stop, [1])),
    )
    count = op.Unsqueeze(op.Sub(stop, start), [1])
    return op.Div(op.Cast(inside, to=like.dtype), op.Cast(count, to=like.dtype))


def _neighbours(x: Any, diameter: int) -> list[Any]:
    """Returns the map shifted to each of D² taps, reflected at its borders."""
    radius = diameter // 2
    size = op.Shape(x)
    for axis in (2, 3):
        x = op.Gather(x, _mirrored(_entry(size, axis), radius), axis=axis)
    # Counted from the end, because sizes are not known.
    ends = [*range(-2 * radius, 0), _LAST]
    return [
        op.Slice(x, [dy, dx], [ends[dy], ends[dx]], [2, 3])
        for dy in range(diameter)
        for dx in range(diameter)
    ]


def _mirrored(size: Any, radius: int) -> Any:
    last = op.Sub(size, 1)
    place = op.Range(-radius, op.Add(size, radius), 1)
    place = op.Mod(place, op.Clip(op.Mul(last, 2), 1))
    return op.Sub(last, op.Abs(op.Sub(last, place)))


def _places(x: Any, cells: tuple[Any, Any]) -> Any:
    size = op.Shape(x)
    shape = op.Shape(op.Slice(x, [0], [1], [1]))  # (B, 1, H, W)
    axes = []
    for axis, count in enumerate(cells):
        pixels = _entry(size, 2 + axis)
        index, many, few = (
            op.Cast(number, to=x.dtype) for number in (op.Range(0, pixels, 1), pixels, count)
        )
        place = op.Div(op.Mul(op.Add(index, ir.tensor(0.5, dtype=x.dtype)), few), many)
        axes.append(op.Expand(op.Unsqueeze(place, [1]) if axis == 0 else place, shape))
    return op.Concat(*axes, axis=1)


def _repeat(cells: Any, size: Any) -> Any:
    own = op.Shape(cells)
    for axis in (2, 3):
        pixels = _entry(size, axis)
        twice = op.Range(1, op.Mul(pixels, 2), 2)
        cell = op.Div(op.Mul(twice, _entry(own, axis)), op.Mul(pixels, 2))
        cells = op.Gather(cells, cell, axis=axis)
    return cells


TRANSLATIONS = {
    getattr(torch.ops.featup_hub, function.__name__).default: function
    for function in (jbu_apply, jbu_kernel, joint_kernel, pool_guidance)
}
"""The function for each operator, as ``torch.onnx.export`` takes them."""
