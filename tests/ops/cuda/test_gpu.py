"""The fused kernels on a real device; ``python -m benchmarks.gpu`` runs the same checks, and times.

Without a device these tests are listed as skipped; FEATUP_HUB_REQUIRE_CUDA=1 makes that a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Session
from benchmarks.gpu_worker import CHECKS, CUDA_CHECKS
from featup_hub import ops
from featup_hub.ops.cuda import backend, programs
from featup_hub.ops.cuda.driver import CudaDriverError, open_driver
from featup_hub.upsamplers import JBUStack

pytestmark = pytest.mark.gpu

USE = """
import torch
from featup_hub.upsamplers import JBUStack
source, image = torch.randn(1, 8, 4, 4).cuda(), torch.randn(1, 3, 16, 16).cuda()
JBUStack(num_stages=2).cuda().eval()(source, image, impl="cuda").sum().item()
"""


@pytest.fixture
def session(cuda: torch.device, tmp_path: Path) -> Session:
    deadline = time.monotonic() + 600
    return Session(device=cuda, impl="cuda", dry=False, deadline=deadline, out=tmp_path)


@pytest.mark.parametrize("check", CHECKS | CUDA_CHECKS)
def test_the_kernels_pass(session, check):
    failed = [row for row in (CHECKS | CUDA_CHECKS)[check](session) if not row["ok"]]
    assert failed == []


def test_auto_takes_the_kernels_and_the_status_says_so(cuda):
    stack = JBUStack(num_stages=2).to(cuda).eval()
    source, image = torch.randn(1, 8, 4, 4, device=cuda), torch.randn(1, 3, 16, 16, device=cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto = stack(source, image)
    assert torch.equal(auto, stack(source, image, impl="cuda"))
    status = ops.implementations()[1]
    assert (status.impl, status.reason) == ("cuda", None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_stack_gives_the_same_bits(cuda, dynamic):
    torch._dynamo.reset()
    stack = JBUStack(num_stages=1).to(cuda).eval()
    compiled = torch.compile(stack, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for h, w in ((3, 4), (5, 3))[: 1 + dynamic]:
        source = torch.randn(1, 8, h, w, device=cuda)
        image = torch.randn(1, 3, 2 * h, 2 * w, device=cuda)
        torch.testing.assert_close(compiled(source, image), stack(source, image))
    torch._dynamo.reset()


def test_processes_that_compile_at_once_share_one_cache(cuda, tmp_path):
    environment = os.environ | {"FEATUP_HUB_CACHE": str(tmp_path)}
    users = [subprocess.Popen([sys.executable, "-c", USE], env=environment) for _ in range(2)]
    assert [user.wait(timeout=300) for user in users] == [0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".cubin", ".cubin"]


def test_a_damaged_cubin_is_compiled_anew(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path))

    def load():
        programs._load.cache_clear()
        programs._compile_once.cache_clear()
        path = programs.prepare(backend.usual_programs()[0], cuda).path
        assert path is not None
        return path.read_bytes()

    whole = load()
    (file,) = tmp_path.iterdir()
    file.write_bytes(whole[:-100] + bytes(100))
    assert load() == whole


def test_an_image_that_is_no_cubin_is_refused_in_words(cuda):
    with pytest.raises(CudaDriverError, match=r"CUDA driver error .* in loading"):
        open_driver().load(0, b"not a cubin" + bytes(64), [])


def test_a_launch_the_device_cannot_do_is_refused_in_words(cuda):
    kernels = programs.prepare(backend.usual_programs()[0], cuda)
    function = kernels.functions["range_forward"]
    with pytest.raises(CudaDriverError, match=r"CUDA driver error .* in range_forward"):
        open_driver().launch(function, (1, 1, 1), 2048, 0, [0] * 7)
