"""Faults in the fused kernels make the suite fail."""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from featup_hub.ops.cuda import backend
from tests.ops.cuda.emulator import COMPILER, SOURCES, Barrier, Edit, EmulationError
from tests.ops.cuda.fused_results import (
    Emulate,
    draw_weights,
    everything,
    halves,
    single,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernels with")


def barriers() -> list[Barrier]:
    return [
        (path.name, line)
        for path in sorted(SOURCES.glob("*.cu*"))
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "__syncthreads();" in text
    ]


@functools.cache
def right() -> list[Tensor]:
    """The results of a device without a fault."""
    return [*everything(), *halves()]


def spoiled(emulate: Emulate, **options: Any) -> bool:
    """Whether somebody notices what is wrong with this device; the first to notice is enough."""
    emulate()
    expected = right()
    for order in range(4):
        emulate(order=order, **options)
        try:
            if not all(map(torch.equal, expected, chain(everything(), halves()))):
                return True
        except EmulationError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line"), barriers())
def test_no_barrier_can_be_missing(emulate: Emulate, file: str, line: int) -> None:
    assert spoiled(emulate, barrier=(file, line))


FAULTS: dict[str, Edit] = {
    "a wrong tap": ("jbu_apply.cu", "tile_x + kx, u, 0)", "tile_x + kx, 6 - u, 0)"),
    "a tap too far": (
        "jbu_kernel.cu",
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
    "a lane's column": ("mma.cuh", "- RADIUS + pair + 1, w)", "- RADIUS + pair, w)"),
    "a row of a product": ("mma.cuh", "u = 2 * step + r / 2 - ky", "u = 2 * step + r % 2 - ky"),
    "half of a weight": (
        "mma.cuh",
        "multiply(sum[n], weights.low[step]",
        "multiply(sum[n], weights.high[step]",
    ),
    "a reader forgotten": ("jbu_apply_backward.cu", "i < 2 * (REACH + APART)", "i < 2 * REACH"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(emulate: Emulate, name: str) -> None:
    assert spoiled(emulate, edit=FAULTS[name])


UNFORGIVABLE: list[tuple[str, str, str]] = [
    ("projection[(long long)key *", "projection[(long long)(key + 1) *", "beyond its ends"),
    (
        "shared[(p * GROUPS + tile.group) * TAPS",
        "shared[(p * GROUPS + tile.group) * 90",
        "behind its end",
    ),
    (
        "    multiply(sum, tile, layer, shared, TAPS);",
        "if (threadIdx.x < 9) __syncthreads();",
        "barriers",
    ),
]


@pytest.mark.parametrize(("text", "instead", "words"), UNFORGIVABLE)
def test_the_emulator_finds_what_a_device_would_not_forgive(
    emulate: Emulate, text: str, instead: str, words: str
) -> None:
    emulate(edit=("jbu_kernel.cu", text, instead + (text if "barriers" in words else "")))
    with pytest.raises(EmulationError, match=words):
        backend.kernel(torch.randn(1, 3, 5, 9), single(draw_weights()))


def test_a_product_that_lanes_are_missing_from_is_found(emulate: Emulate) -> None:
    product = "multiply(sum[n], weights.low[step], operand);"
    emulate(edit=("mma.cuh", product, f"if (threadIdx.x % 32) {product}"))
    with pytest.raises(EmulationError, match="lanes do not all take part"):
        list(halves())
