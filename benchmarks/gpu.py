"""Checks and times the CUDA kernels on a GPU, unattended, within eight minutes.

python -m benchmarks.gpu --out FOLDER [--upstream CHECKOUT] [--seconds 480] [--dry]

In this order: correctness; times of stacks beside the floor that memory sets; single operations and
variants of their kernels; upstream's own kernel, if its sources lie somewhere; compiled baselines;
compute-sanitizer; ncu, if it is installed. ``gpu.json`` and ``gpu.md`` are written anew after every
part. What is left out is listed with the reason. The exit status is 1 if a check or a part failed.
``--dry`` rehearses on a CPU. Needs neither git nor a compiler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featup_hub.ops import Implementation, implementations
from featup_hub.ops.cuda import backend
from featup_hub.upsamplers import JBUStack, stage_sizes

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SANITIZER_SECONDS = 60

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of the problem: sizes are height and width, ``dtype`` is that of the features."""

    source: tuple[int, int]
    output: tuple[int, int]
    channels: int = 384
    batch: int = 1
    dtype: str = "fp32"

    def __str__(self) -> str:
        (h, w), (height, width) = self.source, self.output
        return f"{h}×{w}→{height}×{width} C={self.channels} B={self.batch} {self.dtype}"

    def forward_bytes(self) -> int:
        """Bytes a stack must move: maps read and written once, float32 kernels likewise."""
        sizes = [self.source, *stage_sizes(self.source, self.output)]
        pixels = [h * w for h, w in sizes]
        maps = sum(a + b for a, b in itertools.pairwise(pixels)) * self.channels
        kernels = sum(pixels[1:]) * (2 * 49 + 3)
        return self.batch * (maps * DTYPES[self.dtype].itemsize + 4 * kernels)


def square(n: int, m: int, **options: Any) -> Case:
    """Makes a case of square maps."""
    return Case(source=(n, n), output=(m, m), **options)


CASES = [
    *(
        Case(source=source, output=output, dtype=dtype)
        for source, output in (
            ((32, 32), (512, 512)),
            ((28, 28), (448, 448)),
            ((14, 14), (224, 224)),
            ((27, 40), (427, 640)),
            ((37, 37), (518, 518)),
        )
        for dtype in ("fp32", "bf16")
    ),
    square(14, 224, dtype="fp16", batch=32),
    square(64, 1024, dtype="bf16", channels=1024),
]
DRY = [square(2, 7, channels=8), Case(source=(2, 3), output=(8, 11), channels=8, batch=2)]


@dataclass(kw_only=True)
class Session:
    """One run: where, what is examined, until when, and what was left out and why."""

    device: torch.device
    impl: Implementation
    dry: bool
    deadline: float
    out: Path
    upstream: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run_worker(self, task: str, *, limit: float, prefix: Sequence[str] = ()) -> list[Row]:
        """Runs a task of :mod:`benchmarks.gpu_worker` in its own process, for ``limit`` seconds.

        ``prefix`` is a command to run it under. Returns the rows it printed, one JSON object a
        line, also if it was ended early. Raises RuntimeError if it failed.
        """
        command = [*prefix, sys.executable, "-m", "benchmarks.gpu_worker", task]
        command += ["--device", str(self.device), *(["--dry"] if self.dry else [])]
        command += ["--folder", str(self.upstream)] if self.upstream else []
        limit = max(min(limit, self.left), 1)
        with (self.out / f"{task}.txt").open("w+", encoding="utf-8") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.notes.append(f"{task}: ended after {limit:.0f} s")
                status = 0
            output.seek(0)
            text = output.read()
        if status:
            raise RuntimeError(f"{task} failed with status {status}: {text[-1500:]}")
        return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


class Problem:
    """A stack and inputs of one size; ``stack`` defaults to ours."""

    def __init__(self, case: Case, session: Session, stack: nn.Module | None = None) -> None:
        generator = torch.Generator(session.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=session.device)

        stages = len(stage_sizes(case.source, case.output))
        self.stack = (stack or JBUStack(num_stages=stages)).eval().to(session.device)
        source = normal(case.batch, case.channels, *case.source)
        self.source = source.to(DTYPES[case.dtype]).requires_grad_()
        self.image = normal(case.batch, 3, *case.output)
        self.inputs = [self.source, *self.stack.parameters()]

    def forward(self, **options: Any) -> Tensor:
        """Runs the stack without recording for a backward pass."""
        with torch.no_grad():
            return self.stack(self.source, self.image, **options)

    def backward(self, **options: Any) -> Callable[[], object]:
        """Runs the stack once and returns its backward pass, to be called repeatedly."""
        output = self.stack(self.source, self.image, **options)
        slope = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, self.inputs, slope, retain_graph=True)


def measure(call: Callable[[], object], session: Session, *, graph: bool = False) -> Row:
    """Times a call: median of 5 to 100 runs, each after the L2 cache was flushed by reading.

    With ``graph`` it is also timed as a replayed CUDA graph, without the host's share. Peak memory
    is what the call needs beyond what was allocated before.
    """
    call()
    if session.device.type != "cuda":
        start = time.perf_counter()
        call()
        elapsed = 1000 * (time.perf_counter() - start)
        return {"ms": elapsed, "best_ms": elapsed, "runs": 1}
    session.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(session.device)
    before = torch.cuda.memory_allocated(session.device)
    call()
    session.synchronize()
    peak = torch.cuda.max_memory_allocated(session.device) - before
    times = _times(call, session)
    row = {"ms": statistics.median(times), "best_ms": min(times), "runs": len(times)}
    row["peak_bytes"] = peak
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        row["graph_ms"] = statistics.median(_times(captured.replay, session))
    return row


def _times(call: Callable[[], object], session: Session) -> list[float]:
    cache = torch.cuda.get_device_properties(session.device).L2_cache_size
    other = torch.ones(2 * cache // 4, device=session.device)
    times: list[float] = []
    begin = time.monotonic()
    while len(times) < 5 or (len(times) < 100 and time.monotonic() - begin < 0.3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.sum()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def environment(session: Session) -> Row:
    """Returns what the numbers depend on."""
    found: Row = {"command": " ".join(sys.argv), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu"}
    if session.device.type == "cuda":
        properties = torch.cuda.get_device_properties(session.device)
        found["device"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["l2_mib"] = properties.L2_cache_size / 2**20
        found["driver"] = _nvidia_smi("driver_version")
    return found


def _nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"


def first_use() -> Row:
    """Compiles the kernels as on a card seen for the first time."""
    start = time.monotonic()
    lines = [str(status) for status in implementations()]
    return {"implementations": lines, "seconds": time.monotonic() - start}


def copy_speed(session: Session) -> Row:
    """Measures bytes per second, read and written, of a large copy within the device."""
    count = 1 << (16 if session.dry else 28)
    source = torch.randn(count, device=session.device)
    target = torch.empty_like(source)
    best = measure(lambda: target.copy_(source), session)["best_ms"]
    return {"bytes_per_second": 8 * count / (best / 1000)}


def times(session: Session, impl: Implementation, cases: list[Case]) -> list[Row]:
    """Times stacks, forward and backward."""
    rows: list[Row] = []
    for case in cases:
        if session.left < 20 and not session.dry:
            session.notes.append(f"times, {impl}: stopped before {case}, time is up")
            break
        row: Row = {"case": str(case), "impl": impl, "floor_bytes": case.forward_bytes()}
        clocks = _nvidia_smi("clocks.sm,clocks.mem") if session.device.type == "cuda" else ""
        try:
            problem = Problem(case, session)
            graph = impl == "cuda"
            row["forward"] = measure(lambda p=problem: p.forward(impl=impl), session, graph=graph)
            row["backward"] = measure(problem.backward(impl=impl), session)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error)[:200]
        rows.append(row | {"clocks": clocks})
    return rows


def sanitizer(session: Session, tool: str) -> list[Row]:
    """Runs the small shapes under compute-sanitizer, or bare in a rehearsal."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if session.dry:
        return session.run_worker("sanitize", limit=SANITIZER_SECONDS)
    if not Path(program).is_file():
        session.notes.append(f"{tool}: compute-sanitizer is not installed")
        return []
    # torch's own kernels are not checked here.
    names = sorted({name for program in backend.usual_programs() for name in program.kernels})
    filters = [word for name in names for word in ("--kernel-name", f"kns={name}")]
    prefix = [program, "--tool", tool, "--error-exitcode", "77", *filters]
    return session.run_worker("sanitize", limit=SANITIZER_SECONDS, prefix=prefix)


def profile(session: Session) -> list[Row]:
    """Runs every kernel once under ncu; its table is left in ``profile.txt``."""
    if session.dry or shutil.which("ncu") is None:
        session.notes.append("profile: ncu is not installed, or this is a rehearsal")
        return []
    pattern = "regex:^(range|kernel|apply|fold)_"
    prefix = ["ncu", "--csv", "--set", "basic", "--kernel-name", pattern, "--launch-count", "16"]
    session.run_worker("profile", limit=60, prefix=prefix)
    return [{"table": "profile.txt"}]


Part = tuple[str, Callable[[], Any]]


def parts(session: Session) -> list[Part]:
    """Lists names and what to do, most important first."""
    impl, upstream = session.impl, session.upstream is not None and not session.dry
    worker, cases = session.run_worker, DRY if session.dry else CASES
    listed: list[Part] = [
        ("first use", first_use),
        ("checks", lambda: worker("checks", limit=100)),
        ("copy", lambda: copy_speed(session)),
        ("times", lambda: times(session, impl, cases)),
        ("operations", lambda: worker("operations", limit=60)),
        ("torch", lambda: times(session, "torch", cases[:2])),
        *([("upstream", lambda: worker("upstream", limit=120))] if upstream else []),
        ("compiled", lambda: worker("compiled", limit=60)),
        ("memcheck", lambda: sanitizer(session, "memcheck")),
        ("racecheck", lambda: sanitizer(session, "racecheck")),
        ("profile", lambda: profile(session)),
    ]
    if not upstream:
        session.notes.append("upstream: not asked for (--upstream), or a rehearsal")
    return listed


def run(session: Session) -> int:
    """Runs all parts and returns the exit status: 1 if a check or a part failed."""
    results: Row = {"environment": environment(session), "errors": {}}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FEATUP_HUB_CACHE"] = scratch  # as on a card seen for the first time
        for name, part in parts(session):
            if session.left < 5 and not session.dry:
                session.notes.append(f"{name}: left out, time is up")
                continue
            print(f"[{session.left:4.0f} s left] {name}", flush=True)
            try:
                results[name] = part()
            except Exception as error:  # the other parts must still run
                traceback.print_exc()
                results["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
            results |= {"notes": session.notes, "seconds_left": session.left}
            write(session.out, results)
        del os.environ["FEATUP_HUB_CACHE"]
    checks = [row for part in ("checks", "memcheck", "racecheck") for row in results.get(part, [])]
    return int(bool(results["errors"]) or not all(row["ok"] for row in checks))


def write(out: Path, results: Row) -> None:
    """Writes the results as JSON and as a page with one table of times."""
    (out / "gpu.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    lines = ["# The CUDA kernels on one card", ""]
    lines += [f"- {key}: {value}" for key, value in results["environment"].items()]
    failed = [row for row in results.get("checks", []) if not row["ok"]]
    lines.append(f"- checks: {len(results.get('checks', []))}, of which failed: {failed}")
    lines += [f"- error in {name}: {text}" for name, text in results["errors"].items()]
    lines += [f"- {note}" for note in results.get("notes", [])]
    lines += ["", "| case | by | forward ms | graph ms | × floor | peak MiB | backward ms |"]
    lines.append("|---|---|---|---|---|---|---|")
    speed = results.get("copy", {}).get("bytes_per_second", float("nan"))
    for row in [r for part in ("times", "torch", "upstream") for r in results.get(part, [])]:
        forward, backward = row.get("forward", {}), row.get("backward", {})
        took = forward.get("graph_ms", forward.get("ms", float("nan")))
        ratio = took * speed / (1000 * row["floor_bytes"])
        lines.append(
            f"| {row['case']} | {row['impl']} | {forward.get('ms', float('nan')):.4g} | "
            f"{forward.get('graph_ms', float('nan')):.4g} | {ratio:.2f} | "
            f"{forward.get('peak_bytes', 0) / 2**20:.0f} | {backward.get('ms', float('nan')):.4g} |"
        )
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results")
    parser.add_argument("--upstream", type=Path, help="checkout of upstream's sources")
    parser.add_argument("--seconds", type=float, default=480, help="when to stop")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU, tiny shapes")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --dry rehearses on a CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    session = Session(
        device=torch.device("cpu" if arguments.dry else "cuda:0"),
        impl="torch" if arguments.dry else "cuda",
        dry=arguments.dry,
        deadline=time.monotonic() + arguments.seconds,
        out=arguments.out.resolve(),
        upstream=arguments.upstream and arguments.upstream.resolve(),
    )
    return run(session)


if __name__ == "__main__":
    sys.exit(main())
