"""Proves the CUDA kernels on the card at hand and times them, unattended, within nine minutes.

python -m benchmarks.gpu --out FOLDER [--upstream CHECKOUT] [--seconds 520] [--dry]

In this order: parity, gradients, streams, graphs and offsets; times beside the floor that memory
sets; compute-sanitizer; upstream's own kernel, if its sources lie somewhere; compiled baselines;
the grid of all sizes for as long as there is time. Whatever is left out is listed with the
reason. ``gpu.json`` and ``gpu.md`` are rewritten after every part, so nothing is lost if the run
is ended. The exit status is 1 if a check failed. ``--dry`` rehearses on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import CHECKS, CUDA_CHECKS
from benchmarks.gpu_report import markdown
from benchmarks.gpu_session import ROOT, Session
from benchmarks.gpu_timings import DRY, FIRST, GRID, Case, bandwidth, time_case, time_operations
from featup_hub.ops import implementations
from featup_hub.ops.cuda import backend

Results = dict[str, Any]


def main() -> int:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results")
    parser.add_argument("--upstream", type=Path, help="checkout of upstream's sources")
    parser.add_argument("--seconds", type=float, default=520, help="when to stop")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU, tiny shapes")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --dry rehearses on a CPU")
    session = Session(
        device=torch.device("cpu" if arguments.dry else "cuda:0"),
        impl="torch" if arguments.dry else "cuda",
        dry=arguments.dry,
        deadline=time.monotonic() + arguments.seconds,
        upstream=arguments.upstream and arguments.upstream.resolve(),
    )
    return run(session, arguments.out)


def run(session: Session, out: Path) -> int:
    """Runs all parts; returns the exit status.

    Args:
        session: The session.
        out: Folder for the results.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: Results = {"environment": environment(session), "checks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FEATUP_HUB_CACHE"] = f"{scratch}/cubins"  # a card seen for the first time
        builder = _start_building(session, Path(scratch, "upstream"))
        try:
            for name, seconds, part in _parts(session, results, builder):
                _run_part(name, seconds, part, session, results)
                results["notes"] = session.notes
                results["seconds_left"] = session.left
                (out / "gpu.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
                (out / "gpu.md").write_text(markdown(results), encoding="utf-8")
        finally:
            _end(builder)
            del os.environ["FEATUP_HUB_CACHE"]
    print(markdown(results))
    failed = [name for name, rows in results["checks"].items() if not all(r["ok"] for r in rows)]
    return 1 if failed or results.get("errors") else 0


Part = tuple[str, float, Callable[[], None]]


def _parts(
    session: Session, results: Results, builder: subprocess.Popen[bytes] | None
) -> list[Part]:
    """Lists (name, seconds it takes at most as a rule, what to do), most important first."""

    def check(name: str) -> Callable[[], None]:
        def do() -> None:
            results["checks"][name] = (CHECKS | CUDA_CHECKS)[name](session)

        return do

    def fill(name: str, make: Callable[[], Any]) -> Callable[[], None]:
        return lambda: results.__setitem__(name, make())

    checks = CHECKS if session.dry else CHECKS | CUDA_CHECKS
    first, grid = (DRY, DRY) if session.dry else (FIRST, GRID)
    parts: list[Part] = [
        ("implementations", 20, fill("implementations", lambda: _first_use(session))),
        *((name, 10.0, check(name)) for name in checks),
        ("copy", 2, fill("bytes_per_second", lambda: bandwidth(session))),
        ("times", 20, fill("times", lambda: _times(first, session, results, session.impl))),
        ("operations", 10, fill("operations", lambda: _operations(first, session, results))),
        ("torch path", 20, fill("torch", lambda: _times(first, session, results, "torch"))),
        ("memcheck", 30, lambda: _sanitizer("memcheck", session, results)),
        ("racecheck", 30, lambda: _sanitizer("racecheck", session, results)),
        ("upstream", 30, fill("upstream", lambda: _upstream(session, builder))),
        ("compiled", 30, fill("compiled", lambda: session.ask_worker("compiled", limit=70))),
        ("grid", 10, fill("grid", lambda: _times(grid, session, results, session.impl))),
    ]
    return parts


def _run_part(
    name: str, seconds: float, part: Callable[[], None], session: Session, results: Results
) -> None:
    if session.left < seconds and not session.dry:
        session.notes.append(f"{name}: left out, {session.left:.0f} s were left")
        return
    print(f"[{session.left:4.0f} s left] {name}", flush=True)
    try:
        part()
    except subprocess.TimeoutExpired as error:
        session.notes.append(f"{name}: ended after {error.timeout:.0f} s")
    except Exception as error:  # the other parts must still run
        traceback.print_exc()
        results.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:2000]


def environment(session: Session) -> Results:
    """Returns what the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    found: Results = {
        "command": " ".join(sys.argv),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": platform.processor() or "cpu",
    }
    if session.device.type == "cuda":
        properties = torch.cuda.get_device_properties(session.device)
        found["device"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def _first_use(session: Session) -> list[str]:
    """Makes the kernels ready, and says how long that takes on a card seen for the first time."""
    start = time.monotonic()
    lines = [str(status) for status in implementations()]
    return [*lines, f"compiled and loaded in {time.monotonic() - start:.1f} s"]


def _times(cases: list[Case], session: Session, results: Results, impl: Any) -> list[Results]:
    rows: list[Results] = []
    for case in cases:
        if session.left < 15 and not session.dry:
            session.notes.append(f"times, {impl}: stopped before {case}, time is up")
            break
        memory = torch.cuda.mem_get_info()[0] if session.device.type == "cuda" else 1 << 40
        if case.memory_bytes() > memory:
            needed, free = case.memory_bytes() / 2**30, memory / 2**30
            session.notes.append(f"{case}: may need {needed:.0f} GiB, {free:.0f} are free")
            continue
        rows.append(time_case(case, session, results["bytes_per_second"], impl))
    return rows


def _operations(cases: list[Case], session: Session, results: Results) -> list[Results]:
    speed = results["bytes_per_second"]
    return [row for case in cases for row in time_operations(case, session, speed)]


def _start_building(session: Session, folder: Path) -> subprocess.Popen[bytes] | None:
    """Compiles upstream's extension in the background."""
    if session.upstream is None or session.device.type != "cuda":
        session.notes.append("upstream: not asked for (--upstream), or no GPU")
        return None
    os.environ["FEATUP_HUB_UPSTREAM_BUILD"] = str(folder)
    command = [sys.executable, "-m", "benchmarks.gpu_worker", "build", str(session.upstream)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def _end(builder: subprocess.Popen[bytes] | None) -> None:
    """Ends a builder and the compilers it started."""
    if builder is not None and builder.poll() is None:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.wait()


def _upstream(session: Session, builder: subprocess.Popen[bytes] | None) -> list[Results]:
    if builder is None:
        return []
    status = builder.wait(timeout=max(min(90, session.left), 1))
    if status:
        raise RuntimeError(f"upstream's extension did not compile, status {status}; see above")
    return session.ask_worker("upstream", str(session.upstream), limit=90)


def _sanitizer(tool: str, session: Session, results: Results) -> None:
    """Runs the small shapes under compute-sanitizer, or bare in a rehearsal."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not session.dry and not Path(program).is_file():
        session.notes.append(f"{tool}: compute-sanitizer is not installed")
        return
    names = {name for program in backend.usual_programs() for name in program.kernels}
    command = [program, "--tool", tool, "--error-exitcode", "77"]
    # torch's own kernels are not ours to judge, nor what it asks of the driver.
    filters = [word for name in sorted(names) for word in ("--kernel-name", f"kns={name}")]
    filters += ["--report-api-errors", "no"] if tool == "memcheck" else []
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that every tensor has known ends
    try:
        for prefix in ([],) if session.dry else ([*command, *filters], command):
            done = session.run_worker("sanitize", limit=100, prefix=prefix)
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            if summary:  # else this version does not know a filter
                break
    finally:
        del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]
    ok = done.returncode == 0 and (session.dry or bool(summary))
    results["checks"][tool] = [
        {"status": done.returncode, "summary": " ".join(summary).strip("= "), "ok": ok}
    ]
    if not ok:
        results.setdefault("errors", {})[tool] = (done.stdout + done.stderr)[-3000:]


if __name__ == "__main__":
    sys.exit(main())
