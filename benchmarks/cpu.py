"""Time and peak memory of the folded form on a CPU, against two others, in one run.

    python benchmarks/cpu.py --out cpu.json
    python benchmarks/cpu.py --sizes --out cpu_sizes.json

* unfold: keys unfolded and multiplied by an einsum, as FeatUp's published code forms kernels;
  features filtered tap by tap (unfolding them, too, takes 20 GB at the largest size);
* definition: our ``impl="reference"``, tap by tap throughout;
* folded: our ``impl="torch"``.

Every measurement is a process of its own, so that peak memory is that of one implementation;
implementations take turns, and the ratio is that of their best times.

With ``--sizes`` the default upsampler is measured alone, by CPU time per output pixel, at the sizes
that photographs have, beside this machine's rates of matrix products and copies in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub import JBUStack, load_upsampler
from featup_hub.ops import StageWeights
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
    times = []
    for _ in range(5 if impl == "torch" else 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(times), "bytes": 1024 * peak}


def best(run: Callable[[], object], times: int) -> float:
    """Returns the least CPU time of several runs, after one that sets up memory."""
    run()
    seconds = []
    for _ in range(times):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


def measure_sizes(out: Path | None) -> None:
    """Measures the default upsampler at all sizes, forward and training, 384 channels."""
    torch.manual_seed(0)
    upsampler, a, b = load_upsampler(), torch.randn(1024, 1024), torch.randn(1 << 24)
    copy = torch.empty_like(b)
    rows: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sgemm_gflops": 2e-9 * 1024**3 / best(lambda: a @ a, 5),
        "copy_gbytes": 8e-9 * len(b) / best(lambda: copy.copy_(b), 5),
    }
    print(rows, flush=True)
    for passes in ("forward", "training"):
        for height, width in SIZES:
            size = -(-height // STRIDE), -(-width // STRIDE)
            source, image = torch.randn(1, 384, *size), torch.randn(1, 3, height, width)
            source.requires_grad_(passes == "training")

            def run(source: Tensor = source, image: Tensor = image) -> None:
                with torch.set_grad_enabled(source.requires_grad):
                    output = upsampler(source, image)
                if source.requires_grad:
                    output.sum().backward()

            price = 1e6 * best(run, 2 if passes == "forward" else 1) / (height * width)
            rows[f"{passes} {height}x{width}"] = price
            print(f"{passes} {height}×{width}: {price:.2f} µs per pixel", flush=True)
            if out is not None:
                out.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", action="store_true", help="the default upsampler at all sizes")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each implementation")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    chosen = parser.parse_args()
    if chosen.sizes:
        measure_sizes(chosen.out)
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
