"""Tasks of the GPU benchmark that run in a process of their own, so that they can be ended.

python -m benchmarks.gpu_worker sanitize | compiled | build DIR | upstream DIR
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks
from benchmarks.gpu_session import Session, measure, relative_error
from benchmarks.gpu_timings import DRY, FIRST, Case, Problem
from featup_hub.ops import Implementation
from featup_hub.upsamplers import JBUStack

EXTENSION = "adaptive_conv_cuda_impl"


def sanitize(session: Session, folder: Path | None) -> list[Any]:
    """Runs every kernel once per type at small, odd sizes, for a sanitizer to watch."""
    session.dry = True  # tiny shapes, whoever asks
    rows = gpu_checks.gradients(session) + gpu_checks.parity(session)
    session.synchronize()
    return rows


def compiled(session: Session, folder: Path | None) -> list[Any]:
    """Times the plain paths under ``torch.compile``."""
    rows = []
    for impl in ("torch",) if session.dry else ("torch", "cuda", "reference"):
        rows.append(_compile_and_time(session, impl))
        print(json.dumps(rows), flush=True)  # these survive if the next is ended
    return rows


def _compile_and_time(session: Session, impl: Implementation) -> dict[str, Any]:
    torch._dynamo.reset()
    case = DRY[0] if session.dry else FIRST[0]
    problem = Problem(case, session)
    backend = "aot_eager" if session.dry else "inductor"
    stack = torch.compile(problem.stack, fullgraph=True, backend=backend)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return stack(problem.source, problem.image, impl=impl)

    start = time.monotonic()
    error = relative_error(call(), problem.forward(impl=impl))
    row = {"case": str(case), "impl": f"{impl}, compiled", "difference": error}
    row["compile_s"] = time.monotonic() - start
    return row | _prefixed("forward", measure(call, session))


def build(session: Session, folder: Path | None) -> list[Any]:
    """Compiles upstream's extension, beside the benchmark's other work."""
    _load_extension(folder)
    return []


def upstream(session: Session, folder: Path | None) -> list[Any]:
    """Times upstream's stack, and says how far ours is from it with the same weights."""
    stack_class = _upstream_stack(folder)
    rows = []
    for case in [case for case in FIRST if case.dtype == "fp32"]:
        row = {"case": str(case), "impl": "upstream"}
        with contextlib.suppress(torch.OutOfMemoryError):
            _time_upstream(stack_class(case.channels).eval(), case, session, row)
        rows.append(row)
        print(json.dumps(rows), flush=True)
        torch.cuda.empty_cache()
    return rows


def _time_upstream(stack: Any, case: Case, session: Session, row: dict[str, Any]) -> None:
    problem = Problem(case, session, stack)
    row |= _prefixed("forward", measure(problem.forward, session, seconds=1))
    ours = JBUStack(case.channels)
    ours.load_state_dict(stack.state_dict())
    found = Problem(case, session, ours).forward(impl=session.impl)
    row["difference"] = relative_error(found, problem.forward())
    del found
    row |= _prefixed("backward", measure(problem.backward(), session, seconds=1))


def _prefixed(name: str, timing: Any) -> dict[str, Any]:
    return {f"{name}_{key}": value for key, value in asdict(timing).items()}


def _load_extension(folder: Path | None) -> types.ModuleType:
    from torch.utils import cpp_extension

    assert folder is not None
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    sources = folder / "featup" / "adaptive_conv_cuda"
    target = Path(os.environ["FEATUP_HUB_UPSTREAM_BUILD"])
    target.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        EXTENSION,
        [str(sources / name) for name in ("adaptive_conv_cuda.cpp", "adaptive_conv_kernel.cu")],
        build_directory=str(target),
        # A toolkit with nothing but the compiler lacks headers that torch's own wheels bring.
        extra_include_paths=[
            str(path) for path in Path(torch.__file__).parent.parent.glob("nvidia/cu1*/include")
        ],
    )


def _upstream_stack(folder: Path | None) -> Any:
    """Imports upstream's stack with the extension built here; the CPU one is never called."""
    sys.modules[EXTENSION] = _load_extension(folder)
    sys.modules["adaptive_conv_cpp_impl"] = types.ModuleType("adaptive_conv_cpp_impl")
    sys.path.insert(0, str(folder))
    return importlib.import_module("featup.upsamplers").JBUStack


TASKS = {"sanitize": sanitize, "compiled": compiled, "build": build, "upstream": upstream}


def main() -> None:
    """Runs one task; the last line printed is its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    session = Session(
        device=arguments.device,
        impl="cuda" if arguments.device.type == "cuda" else "torch",
        dry=arguments.dry,
        deadline=time.monotonic() + 600,
    )
    print(json.dumps(TASKS[arguments.task](session, arguments.folder)))


if __name__ == "__main__":
    main()
