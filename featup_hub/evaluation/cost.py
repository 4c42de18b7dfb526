"""Time and peak memory of upsampling all channels of one image.

Peak memory includes the output but not the inputs. It is torch's allocated memory on a GPU, the
growth of the process's resident memory on Linux, and NaN elsewhere. It is accurate to about a MiB.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.features import Bench
from featup_hub.evaluation.sums import Results

MIB = 2**20


def measure_cost(bench: Bench, candidates: Sequence[Candidate]) -> Results:
    """Measures upsamplers in turn on the images after the first, which warms up."""
    count = len(bench.val)
    for turn, index in enumerate([0, 0] if count == 1 else range(count)):
        image = bench.val[index].crop(bench.stride).normalised()
        for each in candidates:
            start = time.process_time()
            source = bench.source.encode(image, each.looks)
            sums = cost_sums(source, image, each, encoding=time.process_time() - start)
            if turn:
                yield "cost", each.name, sums


@torch.inference_mode()
def cost_sums(
    source: Tensor, image: Tensor, upsampler: Candidate, *, encoding: float = 0.0
) -> dict[str, Tensor]:
    """Measures one upsampler on one image, without a head.

    ``encoding`` is what the backbone took, in CPU seconds summed over cores. ``cost`` (5,) is:
    images, seconds, CPU seconds, MiB, and CPU seconds with the backbone's.
    """
    device, on_cuda = source.device, source.is_cuda
    gc.collect()
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: float = torch.cuda.memory_allocated(device)
    else:
        if sys.platform == "linux":
            # Freed memory that the C library keeps would hide new allocations.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    output = upsampler(source, image, (image.shape[-2], image.shape[-1]))
    if on_cuda:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else _resident("VmHWM")
    del output
    costs = [1.0, wall, cpu, (peak - before) / MIB, cpu + encoding]
    return {"cost": torch.tensor(costs, dtype=torch.float64)}


def _resident(key: str) -> float:
    """Reads a memory figure of this process from Linux, in bytes; NaN elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if sys.platform == "linux" else []
    return next((1024.0 * int(x.split()[1]) for x in lines if x.startswith(key)), float("nan"))
