"""Faults in the fused kernels make the suite fail."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from featup_hub.ops import reference
from featup_hub.ops.cuda import backend
from tests.ops.cuda.emulator import COMPILER, SOURCES, Barrier, Edit, EmulationError
from tests.ops.cuda.fused_results import (
    ARCHITECTURES,
    Emulate,
    draw_maps,
    draw_weights,
    error,
    everything,
    halves,
    kernel_pair,
    single,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernels with")

Results = Callable[[], Iterator[Tensor]]


def barriers() -> list[Barrier]:
    """All but one with a mask after a vote: the emulator's lanes meet at the vote, too."""
    return [
        (path.name, line)
        for path in sorted(SOURCES.glob("*.cu*"))
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "__syncthreads();" in text or "__syncwarp();" in text
    ]


@functools.cache
def right(architecture: int) -> dict[Results, list[Tensor]]:
    """The results of a device without a fault."""
    return {part: [*part()] for part in (everything, halves)}


def spoiled(emulate: Emulate, **options: Any) -> bool:
    """Whether somebody notices what is wrong with this device; the first to notice is enough."""
    parts = everything, halves
    for order, architecture in product(range(4), ARCHITECTURES):
        emulate(architecture=architecture)
        expected = right(architecture)
        emulate(order=order, architecture=architecture, **options)
        try:
            if not all(all(map(torch.equal, expected[part], part())) for part in parts):
                return True
        except EmulationError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line"), barriers())
def test_no_barrier_can_be_missing(emulate, file, line):
    assert spoiled(emulate, barrier=(file, line))


FAULTS: dict[str, Edit] = {
    "a wrong tap": ("jbu_apply.cu", "tile_x + kx, u, 0)", "tile_x + kx, 6 - u, 0)"),
    "a tap too far": (
        "tile.cuh",
        "centre[p] * near[1 + a + p]",
        "centre[p] * near[2 + a + p]",
    ),
    "a mirror that repeats the border": ("device.cuh", "2 * (size - 1) - at", "2 * size - 1 - at"),
    "a window one short": ("jbu_apply.cu", "row < WINDOW + below", "row < WINDOW"),
    "a border that is not clamped": (
        "cell.cuh",
        "to[clamp(below - 1 + i, source) - start]",
        "to[min(max(below - 1 + i - start, 0), WINDOW - 1)]",
    ),
    "a lane's column": ("mma.cuh", "* step + j / 2, w)", "* step + 1 - j / 2, w)"),
    "a row of a product": ("mma.cuh", "u = row + j % 2 * 4 - ky", "u = row + j % 2 * 3 - ky"),
    "an operand's rows in the wrong order": (
        "mma.cuh",
        "{row[0][0], row[1][0], row[0][1], row[1][1]}",
        "{row[0][0], row[0][1], row[1][0], row[1][1]}",
    ),
    "a half of a feature twice": (
        "mma.cuh",
        "multiply_tf32(sum[kx], low, weight[kx].high)",
        "multiply_tf32(sum[kx], high, weight[kx].high)",
    ),
    "a column of a window too few": ("mma.cuh", "step < kx + DIAMETER", "step < DIAMETER"),
    "half of a weight": (
        "mma.cuh",
        "multiply(sum[kx], x, weight[kx].low)",
        "multiply(sum[kx], x, weight[kx].high)",
    ),
    "a channel's bias": ("mma.cuh", "FOURS ? loaded + k :", "FOURS ? loaded + (k ^ 1) :"),
    "the pixel beside": ("mma.cuh", "further(to, k, bytes)", "further(to, k ^ 1, bytes)"),
    "a sum that is not checked": ("mma.cuh", "0.f * sum[k / 8]", "0.f * sum[0]"),
    "channels that are not filtered again": ("jbu_apply.cu", "open & bit_of(quad, c)", "open & 1"),
    "a column of a layer": ("tf32.cuh", "x[r % 2 * 2 + r / 2]", "x[r]"),
    "half of a layer's weight": ("predict_mma.cuh", "high, w.low)", "low, w.low)"),
    "weights beyond a unit's": (
        "predict_mma.cuh",
        "8 * step + first + j < inputs",
        "8 * step + first + j < 8 * STEPS",
    ),
    "infinity of the wrong sign": ("predict_mma.cuh", "[r] = rough[r]", "[r] = -rough[r]"),
    "a weight of space": ("predict_mma.cuh", "spatial[8 * n + column + j]", "spatial[8 * n + j]"),
    "a column of the result": ("predict_mma.cuh", "+ column + r % 2] = x", "+ column + r / 2] = x"),
    "a pixel of the result": (
        "predict_mma.cuh",
        "to[i * TAPS] = from[i *",
        "to[i * TAPS] = from[(i ^ 1) *",
    ),
    "a layer without its bias": (
        "predict_mma.cuh",
        "multiply(sum, 0, fixup.bias0",
        "multiply(sum, 0, fixup.bias1",
    ),
    "a maximum of half the taps": (
        "predict_mma.cuh",
        "value, 2));\n}\n\n// Turns",
        "value, 1));\n}\n\n// Turns",
    ),
    "guidance of the wrong channel": (
        "predict_mma.cuh",
        "guidance[channel * plane",
        "guidance[channel / 2 * plane",
    ),
    "a reader forgotten": ("jbu_apply_backward.cu", "i < 2 * (REACH + APART)", "i < 2 * REACH"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(emulate, name):
    assert spoiled(emulate, edit=FAULTS[name])


UNFORGIVABLE: list[tuple[Edit, str]] = [
    (
        ("jbu_kernel.cu", "projection[(long long)key *", "projection[(long long)(key + 1) *"),
        "beyond its ends",
    ),
    (("predict.cuh", "tile.group) * TAPS", "tile.group) * 90"), "behind its end"),
    (
        (
            "predict.cuh",
            "    multiply(sum, tile, layer, shared, TAPS);",
            "if (threadIdx.x < 9) __syncthreads(); multiply(sum, tile, layer, shared, TAPS);",
        ),
        "different barriers",
    ),
    (("jbu_kernel.cu", "threadIdx.x >= THREADS", "threadIdx.x >= 217"), "different barriers"),
    (("tf32.cuh", "0xffffe000u", "0xffffffffu"), "no TF32 number"),
    (
        (
            "predict_mma.cuh",
            "multiply_tf32(sum[n], low",
            "if (threadIdx.x % 32) multiply_tf32(sum[n], low",
        ),
        "lanes do not all take part",
    ),
    (
        (
            "mma.cuh",
            "multiply(sum[kx], x, weight[kx].low",
            "if (threadIdx.x % 32) multiply(sum[kx], x, weight[kx].low",
        ),
        "lanes do not all take part",
    ),
    (("mma.cuh", "blockDim.y * TF32", "0xffffffffu"), "no TF32 number"),
]


def small_maps() -> None:
    """Runs the kernels that predict and filter; what one writes beyond its ends is found there."""
    backend.kernel(torch.randn(1, 3, 5, 9), single(draw_weights()))
    for dtype in (torch.float16, torch.float32):
        backend.apply(torch.randn(1, 8, 2, 3).to(dtype), torch.randn(1, 49, 4, 6), None)


@pytest.mark.parametrize(("edit", "words"), UNFORGIVABLE)
def test_the_emulator_finds_what_a_device_would_not_forgive(emulate, edit, words):
    emulate(edit=edit, architecture=75 if edit[0] in ("jbu_kernel.cu", "predict.cuh") else 90)
    with pytest.raises(EmulationError, match=words):
        small_maps()


@pytest.mark.parametrize(
    "edit",
    [
        (
            "tf32.cuh",
            "low[r] = cut(__uint_as_float(value) - __uint_as_float(high[r]))",
            "low[r] = 0",
        ),
        ("predict_mma.cuh", "multiply_tf32(sum[n], high, w.low);", ""),
        ("mma.cuh", "multiply_tf32(sum[kx], low, weight[kx].high);", ""),
        ("mma.cuh", "multiply_tf32(sum[kx], high, weight[kx].low);", ""),
    ],
)
def test_a_product_of_tf32_numbers_alone_is_not_precise_enough(emulate, edit):
    emulate(edit=edit)
    if edit[0] == "mma.cuh":
        source, kernel, _ = draw_maps(3, 5, 8)
        found = backend.apply(source.float(), kernel.float(), None)
        assert error(found, reference.jbu_apply(source, kernel)) > 1e-5
    else:
        guidance = torch.randn(1, 3, 6, 33, dtype=torch.float64)
        assert error(*kernel_pair(guidance, draw_weights())) > 1e-5
