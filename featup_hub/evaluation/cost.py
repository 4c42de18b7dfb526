"""Time and peak memory of upsampling all channels of one image."""

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
from featup_hub.evaluation.statistics import Metric
from featup_hub.evaluation.sums import Measurement

__all__ = ["COST", "measure_cost"]

MIB = 2**20


def measure_cost(bench: Bench, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Measures upsamplers in turn on a few images, after one warm-up image.

    Raises:
        ValueError: If there are no images.
    """
    found = bench.measurement("cost")
    dataset = bench.val.spread(bench.config.cost_images + 1)
    if not len(dataset):
        raise ValueError(f"time and memory need at least one image; {bench.val.name} has none")
    for turn, index in enumerate([0, 0] if len(dataset) == 1 else range(len(dataset))):
        image = dataset[index].crop(bench.stride).normalised()
        for each in candidates:
            start = time.process_time()
            source = bench.source.encode(image, each.looks)
            sums = cost_sums(source, image, each, encoding=time.process_time() - start)
            if turn:
                found.add(each.name, sums)
    return [found]


@torch.inference_mode()
def cost_sums(
    source: Tensor, image: Tensor, upsampler: Candidate, *, encoding: float = 0.0
) -> dict[str, Tensor]:
    """Measures one upsampler on one image, without a head.

    Peak memory includes the output but not the inputs. It is torch's allocated memory on a GPU, the
    growth of the process's resident memory on Linux, and NaN elsewhere. It is accurate to about a
    MiB.

    Args:
        source: Features, (1, C, h, w).
        image: Normalised RGB, (1, 3, H, W).
        upsampler: The upsampler.
        encoding: Backbone's CPU seconds, summed over cores.

    Returns:
        ``cost`` (5,): images, seconds, CPU seconds summed over cores, MiB, and CPU seconds
        including the backbone's.
    """
    size = (image.shape[-2], image.shape[-1])
    device = source.device
    before = _start_peak(device)
    wall, cpu = time.perf_counter(), time.process_time()
    output = upsampler(source, image, size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = (_peak(device) - before) / MIB
    del output
    return {"cost": torch.tensor([1.0, wall, cpu, peak, cpu + encoding], dtype=torch.float64)}


def _start_peak(device: torch.device) -> float:
    """Resets the peak; returns the memory in use, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return float("nan")
    # Freed memory that the C library keeps would hide new allocations.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if sys.platform == "linux" else float("nan")


def _status(key: str) -> float:
    """Reads a memory figure of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) * 1024
    return float("nan")


def _mean(name: str, index: int) -> Metric:
    return Metric(
        name=name,
        sums="cost",
        value=lambda sums: sums[..., index] / sums[..., 0],
        higher_is_better=False,
        percent=False,
    )


COST = (
    _mean("seconds", 1),
    _mean("CPU seconds", 2),
    _mean("peak MiB", 3),
    _mean("CPU seconds with backbone", 4),
)
