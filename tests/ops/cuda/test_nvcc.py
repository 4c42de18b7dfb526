"""The kernels compile for every architecture, without a warning and without spilling."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.compiled_kernels import NVCC_ARCHITECTURES, compile_with_nvcc, usage
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.programs import Program

PROGRAMS = backend.usual_programs()
# Without tensor cores and with them, every program is compiled; elsewhere, one of them.
CASES = [
    pytest.param(program, architecture, marks=[] if architecture == 90 else pytest.mark.slow)
    for row, architecture in enumerate(NVCC_ARCHITECTURES)
    for column, program in enumerate(PROGRAMS)
    if architecture in (75, 90) or row == column
]
MOST_SHARED_BYTES = 48 * 1024  # limit of every device without permission


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("program", "architecture"), CASES, ids=str)
def test_no_kernel_spills_or_asks_for_more_than_48_kilobytes(
    program: Program, architecture: int
) -> None:
    _, log = compile_with_nvcc(program, architecture)
    found = usage(log)
    assert set(found) == set(program.kernels)
    assert not {name for name, use in found.items() if use.spilled}
    for name, kernel in program.kernels.items():
        assert kernel.shared_bytes <= MOST_SHARED_BYTES
        assert found[name].blocks(kernel, architecture) >= 1
