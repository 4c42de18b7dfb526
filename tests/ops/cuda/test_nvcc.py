"""The kernels compile for every architecture, without a warning and without spilling."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.resources import ARCHITECTURES, resources
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.programs import Program

OTHERS = [pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a != 90]
MOST_SHARED_BYTES = 48 * 1024  # what any device grants without asking


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", [90, *OTHERS])
@pytest.mark.parametrize("program", backend.usual_programs(), ids=str)
def test_no_kernel_spills_or_asks_for_more_than_48_kilobytes(
    program: Program, architecture: int
) -> None:
    found = resources(program, architecture)
    assert {kernel.name for kernel in found} == set(program.kernels)
    assert not [kernel for kernel in found if kernel.spilled]
    assert max(kernel.shared_bytes for kernel in found) <= MOST_SHARED_BYTES
    assert all(kernel.blocks(architecture) >= 1 for kernel in found)
