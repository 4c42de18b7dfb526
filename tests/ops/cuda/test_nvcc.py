"""The kernels compile for every architecture, without a warning and without spilling."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.compiled_kernels import NVCC_ARCHITECTURES, compile_with_nvcc, usage
from featup_hub.ops.cuda import backend

PROGRAMS = backend.usual_programs()
# Every program for sm_90, which has most tensor-core code, and one program for every architecture.
# `python -m benchmarks.compiled_kernels --compiler nvcc` compiles all pairs.
CASES = [
    (program, architecture)
    for program, own in zip(PROGRAMS, NVCC_ARCHITECTURES, strict=True)
    for architecture in sorted({90, own})
]
MOST_SHARED_BYTES = 48 * 1024  # limit of every device without permission


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(("program", "architecture"), CASES, ids=str)
def test_no_kernel_spills_or_asks_for_more_than_48_kilobytes(program, architecture):
    _, log = compile_with_nvcc(program, architecture)
    found = usage(log)
    assert set(found) == set(program.kernels)
    assert not {name for name, use in found.items() if use.spilled}
    for name, kernel in program.kernels.items():
        assert kernel.shared_bytes <= MOST_SHARED_BYTES
        assert found[name].blocks(kernel, architecture) >= 1
