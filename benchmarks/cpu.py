"""Time and peak memory of the folded form on a CPU, against two others, in one run.

    python benchmarks/cpu.py --out cpu.json
    python benchmarks/cpu.py --sizes --out cpu_sizes.json
    python benchmarks/cpu.py --floor
    python benchmarks/cpu.py --host

* unfold: keys unfolded and multiplied by an einsum, as FeatUp's published code forms kernels;
  features filtered tap by tap (unfolding them, too, takes 20 GB at the largest size);
* definition: our ``impl="reference"``, tap by tap throughout;
* folded: our ``impl="torch"``.

Every measurement is a process of its own, so that peak memory is that of one implementation;
implementations take turns, and the ratio is that of their best times.

With ``--sizes`` the default upsampler is measured alone, by CPU time per output pixel, at the sizes
that photographs have, beside this machine's rates of matrix products and copies in the same run.

With ``--floor`` it is compared with the time that its multiply-adds and bytes would take at those
rates: CPU time with OMP_NUM_THREADS=1, else time on the clock. Both measure a process that keeps
its memory; ``--floor`` also one that gets new memory for every map, as Linux does by default.

With ``--host`` the CUDA kernels are launched on a driver that does nothing: what remains of a
forward pass is Python and torch's dispatch. Maps are so small that their arithmetic takes no time.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featup_hub import JBUStack, load_upsampler
from featup_hub.ops import StageWeights
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.driver import CudaDriver
from featup_hub.ops.cuda.programs import FusedKernels, Program
from featup_hub.ops.reference import jbu_apply, spatial_logits

CASES = [
    ("forward", 384, 14, 224),
    ("forward", 768, 14, 224),
    ("forward", 384, 16, 256),
    ("forward", 384, 32, 512),
    ("training", 384, 14, 224),
]


SIZES = [(448, 640), (427, 640), (375, 500), (518, 518), (480, 360), (224, 224)]
STRIDE = 16
IMPLEMENTATIONS = ("unfold", "reference", "torch")


def unfold_kernel(guidance: Tensor, weights: StageWeights) -> Tensor:
    """Forms kernels with the neighbourhood of every pixel laid out in memory."""
    batch, _, height, width = guidance.shape
    first = F.conv2d(guidance, weights.range_w0[:, :, None, None], weights.range_b0)
    keys = F.conv2d(F.gelu(first), weights.range_w1[:, :, None, None], weights.range_b1)
    padded = F.pad(keys, [weights.radius] * 4, mode="reflect")
    unfolded = F.unfold(padded, weights.diameter).view(batch, -1, 49, height, width)
    logits = torch.einsum("bcphw,bchw->bphw", unfolded, keys)
    spatial = spatial_logits(weights.sigma_spatial, weights.diameter).exp()
    kernel = (weights.range_temp.exp() * logits).softmax(1) * spatial[:, None, None]
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
    hidden = torch.cat([kernel, guidance], 1)
    hidden = F.gelu(F.conv2d(hidden, weights.fixup_w0[:, :, None, None], weights.fixup_b0))
    return kernel + 0.1 * F.conv2d(hidden, weights.fixup_w1[:, :, None, None], weights.fixup_b1)


def unfold_stack(stack: JBUStack, source: Tensor, image: Tensor) -> Tensor:
    """Passes features through all stages and the closing convolution, in upstream's order."""
    for stage in stack.stages(4):
        size = (2 * source.shape[2], 2 * source.shape[3])
        kernel = unfold_kernel(F.adaptive_avg_pool2d(image, size), stage.weights())
        source = jbu_apply(source, kernel)
    return source + 0.1 * stack.fixup_proj(source)


def measure(passes: str, channels: int, low: int, high: int, impl: str) -> dict[str, float]:
    """Runs one case in this process: best time in seconds, peak memory in bytes."""
    torch.manual_seed(0)
    stack = JBUStack(channels, dropout=0).eval()
    source, image = torch.randn(1, channels, low, low), torch.randn(1, 3, high, high)
    training = passes == "training"
    source.requires_grad_(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            if impl == "unfold":
                output = unfold_stack(stack, source, image)
            else:
                output = stack(source, image, impl=impl)
            if training:
                output.sum().backward()

    with torch.no_grad():  # what the libraries set up once is not counted
        stack(source[..., :4, :4], image[..., :64, :64], impl="torch")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = timeit.repeat(run, number=1, repeat=5 if impl == "torch" else 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(times), "bytes": 1024 * peak}


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
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", action="store_true", help="the default upsampler at all sizes")
    parser.add_argument("--floor", action="store_true", help="and beside this machine's rates")
    parser.add_argument("--host", action="store_true", help="the time without a device")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each of them")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    chosen = parser.parse_args()
    if chosen.sizes:
        measure_sizes(chosen.rounds, chosen.out)
        return
    if chosen.floor or chosen.host:
        (measure_floor if chosen.floor else measure_host)()
        return
    if chosen.one:
        passes, channels, low, high, impl = chosen.one
        print(json.dumps(measure(passes, int(channels), int(low), int(high), impl)))
        return
    rows = []
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"torch {torch.__version__}, fp32, batch 1\n")
    print("| pass | C | size | unfold | definition | folded | faster than | memory | output |")
    print("|---|---|---|---|---|---|---|---|---|")
    for passes, channels, low, high in CASES:
        best: dict[str, dict[str, float]] = {}
        for _ in range(chosen.rounds):
            for impl in IMPLEMENTATIONS:
                case = [passes, str(channels), str(low), str(high), impl]
                command = [sys.executable, __file__, "--one", *case]
                result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                known = best.setdefault(impl, result)
                best[impl] = {key: min(known[key], result[key]) for key in result}
        output = 4 * channels * high * high
        rows.append({"case": [passes, channels, low, high], "output": output, **best})
        seconds = [best[impl]["seconds"] for impl in IMPLEMENTATIONS]
        memory = " / ".join(f"{best[impl]['bytes'] / 2**20:.0f}" for impl in IMPLEMENTATIONS)
        times = " | ".join(f"{value:.3f} s" for value in seconds)
        ratios = " and ".join(f"×{value / seconds[-1]:.1f}" for value in seconds[:-1])
        print(
            f"| {passes} | {channels} | {low}²→{high}² | {times} | {ratios} | {memory} MiB | "
            f"{output / 2**20:.0f} MiB |",
            flush=True,
        )
    if chosen.out:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        chosen.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
