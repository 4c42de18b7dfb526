"""Time of the default upsampler on a CPU, without a backbone.

    python benchmarks/cpu.py --sizes --out cpu_sizes.json
    python benchmarks/cpu.py --floor
    python benchmarks/cpu.py --host

``--sizes`` measures CPU time per output pixel at the sizes that photographs have, beside this
machine's rates of matrix products and copies in the same run.

``--floor`` compares it with the time that its multiply-adds and bytes would take at those rates:
CPU time with OMP_NUM_THREADS=1, else time on the clock. Both measure a process that keeps its
memory; ``--floor`` also one that gets new memory for every map, as Linux does by default.

``--host`` launches the CUDA kernels on a driver that does nothing: what remains of a forward pass
is Python and torch's dispatch. Maps are so small that their arithmetic takes no time.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import functools
import json
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featup_hub import load_upsampler
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.driver import CudaDriver
from featup_hub.ops.cuda.programs import FusedKernels, Program

SIZES = [(448, 640), (427, 640), (375, 500), (518, 518), (480, 360), (224, 224)]
STRIDE = 16


def best(
    run: Callable[[], object], times: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Returns the least time of several runs, after one that sets up memory."""
    run()
    return min(timeit.repeat(run, timer=clock, number=1, repeat=times))


def rates(clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Measures matrix products and copies, in 1e9 operations and 1e9 bytes a second."""
    a, b = torch.randn(1024, 1024), torch.randn(1 << 24)
    copy = torch.empty_like(b)
    return {
        "sgemm_gflops": 2e-9 * 1024**3 / best(lambda: a @ a, 5, clock),
        "copy_gbytes": 8e-9 * len(b) / best(lambda: copy.copy_(b), 5, clock),
    }


def keep_memory() -> None:
    """Lets the process keep the memory that it frees, on Linux.

    Else every large map is new memory, page by page. On a virtual machine this took between 5 and
    50 % of the time, as chance would have it.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def measure_sizes(rounds: int, out: Path | None) -> None:
    """Measures the default upsampler at all sizes, forward and training, 384 channels.

    The sizes take turns. The least price counts, and the median of a price over that of the first
    size in the same turn.
    """
    keep_memory()
    torch.manual_seed(0)
    upsampler = load_upsampler()
    rows: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **rates(),
    }
    print(rows, flush=True)
    for passes in ("forward", "training"):
        prices: dict[tuple[int, int], list[float]] = {size: [] for size in SIZES}
        for _ in range(rounds):
            for height, width in SIZES:
                size = -(-height // STRIDE), -(-width // STRIDE)
                source, image = torch.randn(1, 384, *size), torch.randn(1, 3, height, width)
                source.requires_grad_(passes == "training")

                def run(source: Tensor = source, image: Tensor = image) -> None:
                    with torch.set_grad_enabled(source.requires_grad):
                        output = upsampler(source, image)
                        if source.requires_grad:
                            output.sum().backward()

                prices[height, width].append(1e6 * best(run, 1) / (height * width))
        for (height, width), found in prices.items():
            turns = zip(found, prices[SIZES[0]], strict=True)
            ratio = statistics.median(price / first for price, first in turns)
            rows[f"{passes} {height}x{width}"] = {"least": min(found), "ratio": ratio}
            print(
                f"{passes} {height}×{width}: {min(found):.2f} µs per pixel, ratio {ratio:.2f}",
                flush=True,
            )
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def floor(low: int, channels: int) -> tuple[int, int]:
    """Returns the multiply-adds and bytes of four stages: kernels, folding, filters; float32."""
    outputs = [(low * 2**n) ** 2 for n in (1, 2, 3, 4)]
    per_pixel = 35 * 32 + 25 * 32 + 52 * 49 + 49 * 49 + 2 * 7**3 + 49 * channels
    maps = sum(outputs) + outputs[-1] // 256 + sum(outputs[:-1])  # written, read
    return sum(outputs) * per_pixel, 4 * (maps * channels + 2 * 49 * sum(outputs))


def measure_floor() -> None:
    """Compares the default upsampler's forward pass with what this machine could do."""
    torch.manual_seed(0)
    upsampler, channels, threads = load_upsampler(), 384, torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    for low, memory in ((14, "new"), (32, "new"), (14, "kept"), (32, "kept")):
        if memory == "kept":
            keep_memory()
        source, image = torch.randn(1, channels, low, low), torch.randn(1, 3, 16 * low, 16 * low)
        with torch.inference_mode():
            seconds = best(lambda x=source, y=image: upsampler(x, y), 5, clock)
        rate, (products, moved) = rates(clock), floor(low, channels)
        least = 2e-9 * products / rate["sgemm_gflops"] + 1e-9 * moved / rate["copy_gbytes"]
        figures = ", ".join(f"{name} {value:.1f}" for name, value in rate.items())
        print(
            f"{threads} threads, {memory} memory, {low}²→{16 * low}²: {1000 * seconds:.0f} ms, "
            f"floor {1000 * least:.0f} ms, {seconds / least:.1f} times; {figures}",
            flush=True,
        )


class Silent:
    """The CUDA driver's library; every call succeeds at once."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Returns a function of the driver."""
        return lambda *arguments: 0


class Counter(TorchDispatchMode):
    """Counts torch's operators; the operators of this package are one each."""

    def __init__(self) -> None:
        super().__init__()
        self.found = collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operator and runs it."""
        self.found["views" if func.is_view else "other operators"] += 1
        return func(*args, **(kwargs or {}))


def measure_host() -> None:
    """Counts operators and launches of a forward pass, and measures its time without a device."""
    with mock.patch("ctypes.CDLL", return_value=Silent()):
        driver = CudaDriver()
    stream = SimpleNamespace(cuda_stream=0)

    @functools.cache
    def prepare(program: Program, device: torch.device) -> FusedKernels:
        return FusedKernels(
            device=-1,  # torch's index of the CPU
            multiprocessors=132,
            program=program,
            driver=driver,
            functions=driver.load(-1, b"", program.kernels),
            path=None,
            compiler="none",
        )

    upsampler = load_upsampler()
    source, image = torch.randn(1, 8, 2, 2), torch.randn(1, 3, 32, 32)

    def run() -> None:
        upsampler(source, image, impl="cuda")

    with (
        mock.patch.object(backend, "prepare", prepare),
        mock.patch.object(torch.cuda, "current_stream", lambda device: stream),  # noqa: PT008
        torch.inference_mode(),
    ):
        seconds = best(run, 500)
        launch = mock.Mock(wraps=driver.launch)
        with Counter() as counter, mock.patch.object(driver, "launch", launch):
            run()
    counts = {"launches of this package": launch.call_count, **counter.found}
    print(f"{1e6 * seconds:.0f} µs, {counts}")


def main() -> None:
    """Runs the measurement asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sizes", action="store_true", help="the price of a pixel at every size")
    what.add_argument("--floor", action="store_true", help="beside this machine's rates")
    what.add_argument("--host", action="store_true", help="the time without a device")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each size")
    parser.add_argument("--out", type=Path, help="JSON file of --sizes")
    chosen = parser.parse_args()
    if chosen.sizes:
        measure_sizes(chosen.rounds, chosen.out)
    elif chosen.floor:
        measure_floor()
    else:
        measure_host()


if __name__ == "__main__":
    main()
