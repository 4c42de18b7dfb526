"""What the parts of the GPU benchmark share: the device, the clock, the errors' yardstick."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featup_hub.ops import Implementation, StageWeights
from featup_hub.upsamplers import JBUStage

ROOT = Path(__file__).resolve().parents[1]
FLUSH_BYTES = 256 << 20  # larger than any card's L2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class Session:
    """One run of the benchmark.

    Attributes:
        device: Where everything happens.
        impl: What is examined.
        dry: Rehearse: tiny shapes, one repetition, nothing that needs a GPU.
        deadline: When to stop, on ``time.monotonic``'s clock.
        upstream: Checkout of the upstream project, or None.
        notes: What was left out, and why.
        random: Source of every shape and value.
    """

    device: torch.device
    impl: Implementation
    dry: bool
    deadline: float
    upstream: Path | None = None
    notes: list[str] = field(default_factory=list)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def integer(self, low: int, high: int) -> int:
        """Draws from low..high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws values, on the device."""
        return torch.randn(shape, generator=self.random).to(self.device, dtype)

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Lets modules made inside begin with weights of this session's draw."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.integer(0, 2**31 - 1))
            yield

    def stage(self) -> JBUStage:
        """Makes a stage with weights unlike those a stage begins with."""
        with self.seeded(), torch.no_grad():
            stage = JBUStage().eval()
            for parameter in stage.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=self.random))
        return stage.to(self.device)

    def weights(self) -> StageWeights:
        """Draws a stage's weights."""
        return StageWeights(*(tensor.detach() for tensor in self.stage().weights()))

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run_worker(
        self, task: str, *arguments: str, limit: float, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Runs a task of :mod:`benchmarks.gpu_worker` in a process of its own.

        Args:
            task: Its name.
            arguments: Its arguments.
            limit: Seconds after which it is ended; this session's end comes first.
            prefix: A command to run it under.

        Raises:
            subprocess.TimeoutExpired: If it was ended; holds what it had printed.
        """
        command = [*prefix, sys.executable, "-m", "benchmarks.gpu_worker", task, *arguments]
        command += ["--device", str(self.device), *(["--dry"] if self.dry else [])]
        limit = max(min(limit, self.left), 1)
        return subprocess.run(
            command, cwd=ROOT, timeout=limit, capture_output=True, text=True, check=False
        )

    def ask_worker(self, task: str, *arguments: str, limit: float) -> list[dict[str, Any]]:
        """Runs a task that prints its rows as JSON, last line last.

        A task that was ended has printed some; a note says so.
        """
        try:
            done = self.run_worker(task, *arguments, limit=limit)
        except subprocess.TimeoutExpired as error:
            self.notes.append(f"{task}: ended after {error.timeout:.0f} s")
            printed = (error.stdout or b"").decode()
        else:
            printed = done.stdout
            if done.returncode:
                raise RuntimeError(f"{task} failed: {(done.stderr or printed)[-1500:]}")
        whole = printed[: printed.rfind("\n") + 1]
        lines = [line for line in whole.splitlines() if line.startswith("[")]
        return json.loads(lines[-1]) if lines else []


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns max |found - expected| / max |expected|; infinite where anything is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    error = (found.double() - expected.double()).abs().max()
    return float(error / expected.double().abs().max().clamp(min=1e-30))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a call takes, and what it needs beyond its inputs.

    Attributes:
        median_ms: Median of all runs, caches flushed before each.
        best_ms: Shortest.
        runs: How many.
        peak_bytes: Most memory at one time, beyond what was there before; None on a CPU.
    """

    median_ms: float
    best_ms: float
    runs: int
    peak_bytes: int | None


def measure(call: Callable[[], object], session: Session, *, seconds: float = 0.3) -> Timing:
    """Times a call on the session's device, after two calls to warm up.

    Args:
        call: What to time; it must not wait for the device.
        session: The session.
        seconds: How long to repeat; at least five and at most 200 times.
    """
    call()
    session.synchronize()
    if session.device.type != "cuda":
        start = time.perf_counter()
        call()
        elapsed = 1000 * (time.perf_counter() - start)
        return Timing(median_ms=elapsed, best_ms=elapsed, runs=1, peak_bytes=None)
    torch.cuda.reset_peak_memory_stats(session.device)
    before = torch.cuda.memory_allocated(session.device)
    call()
    session.synchronize()
    peak = torch.cuda.max_memory_allocated(session.device) - before
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=session.device)
    times: list[float] = []
    begin = time.monotonic()
    while len(times) < 5 or (len(times) < 200 and time.monotonic() - begin < seconds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return Timing(
        median_ms=statistics.median(times), best_ms=min(times), runs=len(times), peak_bytes=peak
    )
