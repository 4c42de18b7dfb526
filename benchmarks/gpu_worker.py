"""Tasks of the GPU benchmark in separate processes, because they may crash or be ended.

python -m benchmarks.gpu_worker TASK [--device cpu] [--dry] [--folder UPSTREAM]

Every task prints rows, one JSON object a line. A row of a check says whether it is ``ok``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import CASES, DRY, DTYPES, Case, Problem, Row, Session, measure
from featup_hub.ops import Implementation, StageWeights, jbu_apply, jbu_kernel, joint_kernel
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.programs import Program
from featup_hub.upsamplers import JBUStack, JBUStage

# An error may be this many times the one of the definition in the same precision, or a rounding of
# float32: the largest errors of 1000 draws on a CPU were 4e-6 of kernels and 2.4e-5 of gradients,
# where a few pixels' terms cancel.
SLACK, ROUNDING, GRADIENT_ROUNDING = 4.0, 1e-5, 5e-5
LAYOUTS = ("contiguous", "channels_last", "sliced")
RATIOS = ((2, 2), (1, 1), (1.75, 1.75), (1.95, 2), (1.4, 2.5))

Rows = Iterator[Row]


def relative_error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Returns the largest error over the largest value; infinite where anything is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return math.inf
    error = float((found.double() - expected.double()).abs().max())
    return error / max(float(expected.double().abs().max()), scale, 1e-30)


def poison(session: Session) -> None:
    """Fills memory that is about to be handed out again with NaN."""
    if session.device.type == "cuda":
        sizes = [2**power for power in range(8, 25)] * 3
        [torch.full((size,), math.nan, device=session.device) for size in sizes]


def draw_stage(session: Session) -> StageWeights:
    """Draws weights unlike those a stage begins with."""
    stage = JBUStage().to(session.device)
    weights = (w.detach() + 0.1 * torch.randn_like(w) for w in stage.weights())
    return StageWeights(*weights)


def draw(session: Session, index: int) -> tuple[Row, Tensor, Tensor, Tensor | None]:
    """Draws source, guidance and bias of random sizes, every ratio, type and layout in turn."""

    def lay_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            wide = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3]), math.nan)
            return wide[:, 1:, 1:-1].copy_(x)
        return x

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))

    batch, channels = integer(1, 3), integer(1, 9 if session.dry else 300)
    if index % 2 == 0:  # vectors take channels in fours
        channels = -(-channels // 8) * 8
    h, w = (integer(1, 4 if session.dry else 40) for _ in range(2))
    height, width = (max(round(n * r), 1) for n, r in zip((h, w), RATIOS[index % 5], strict=True))
    dtype, layout = list(DTYPES.values())[index % 3], LAYOUTS[integer(0, 2)]
    source = lay_out(torch.randn(batch, channels, h, w).to(session.device, dtype))
    guidance = lay_out(torch.randn(batch, 3, height, width).to(session.device))
    bias = torch.randn(channels).to(session.device) if index % 2 else None
    row = {"source": list(source.shape), "output": [height, width], "layout": layout}
    return row | {"dtype": str(dtype).removeprefix("torch.")}, source, guidance, bias


def parity(session: Session) -> Rows:
    """Both operations against the definition in float64, twice the same bits."""
    for index in range(15 if session.dry else 60):
        row, source, guidance, bias = draw(session, index)
        weights = draw_stage(session)
        exact = jbu_kernel(
            guidance.double(), StageWeights(*(w.double() for w in weights)), impl="reference"
        )
        own = relative_error(jbu_kernel(guidance, weights, impl="reference"), exact)
        poison(session)
        kernel = jbu_kernel(guidance, weights, impl=session.impl)
        row["kernel_error"] = relative_error(kernel, exact)
        ok = row["kernel_error"] <= max(SLACK * own, ROUNDING)

        wide = None if bias is None else bias.double()
        exact = jbu_apply(source.double(), kernel.double(), wide, impl="reference")
        own = relative_error(jbu_apply(source, kernel, bias, impl="reference"), exact)
        poison(session)
        output = jbu_apply(source, kernel, bias, impl=session.impl)
        row["output_error"] = relative_error(output, exact)
        same = torch.equal(output, jbu_apply(source, kernel, bias, impl=session.impl))
        ok = ok and same and row["output_error"] <= max(SLACK * own, ROUNDING)
        yield row | {"deterministic": same, "ok": ok}


def gradients(session: Session) -> Rows:
    """Every gradient against autograd through the definition in float64, twice the same bits."""
    for index in range(5 if session.dry else 40):
        row, source, guidance, bias = draw(session, index)
        slope = torch.randn(*source.shape[:2], *guidance.shape[-2:]).to(source)
        inputs = [source, guidance, *draw_stage(session)]
        inputs += [] if bias is None else [bias]
        exact = _gradients([x.double() for x in inputs], slope, "reference")
        own = _errors(_gradients(inputs, slope, "reference"), exact)
        poison(session)
        found = _gradients(inputs, slope, session.impl)
        same = all(map(torch.equal, found, _gradients(inputs, slope, session.impl)))
        errors = _errors(found, exact)
        row |= {"error": max(errors), "limit": max(SLACK * max(own), GRADIENT_ROUNDING)}
        yield row | {"deterministic": same, "ok": same and row["error"] <= row["limit"]}


def _gradients(inputs: list[Tensor], slope: Tensor, impl: Implementation) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    source, guidance = leaves[:2]
    weights, bias = StageWeights(*leaves[2:12]), leaves[12] if len(leaves) > 12 else None
    kernel = jbu_kernel(guidance, weights, impl=impl)
    output = jbu_apply(source, kernel, bias, impl=impl)
    return list(torch.autograd.grad(output, leaves, slope.to(output.dtype)))


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Weights' gradients are sums that may cancel: they share the scale of the largest of them."""
    scale = max(float(x.abs().max()) for x in exact[2:12])
    scales = [0.0, 0.0, *[scale] * 10, 0.0]
    return [relative_error(*row) for row in zip(found, exact, scales, strict=False)]


def joint(session: Session) -> Rows:
    """The joint bilateral stage's kernels against the definition in float64."""
    for cells, size in (((7, 9), (7, 9)), ((7, 9), (13, 18)), ((13, 18), (26, 35))):
        maps = (torch.randn(2, 32, *n).to(session.device) / 6 for n in (size, cells))
        inputs = [*maps, *torch.tensor([1.25, 0.17], device=session.device)]
        options = {"cells": (7, 9), "radius": 3}
        exact = joint_kernel(*(x.double() for x in inputs), impl="reference", **options)
        poison(session)
        error = relative_error(joint_kernel(*inputs, impl=session.impl, **options), exact)
        yield {"size": list(size), "error": error, "ok": error <= ROUNDING}


def every_tap(session: Session) -> Rows:
    """Each of the 49 taps of each pixel gets a gradient."""
    source = torch.randn(2, 5, 6, 7).to(session.device)
    kernel = torch.randn(2, 49, 12, 14).to(session.device).requires_grad_()
    output = jbu_apply(source, kernel, impl=session.impl)
    (slope,) = torch.autograd.grad(output.square().sum(), kernel)
    share = float((slope != 0).float().mean())
    yield {"share of taps with a gradient": share, "ok": share == 1.0}


def offsets(session: Session) -> Rows:
    """More than 2^31 elements: the far end is right, forward and backward."""
    h, channels = (2, 8) if session.dry else (736, 1024)  # 2.2e9 outputs, 4.4 GB in bfloat16
    needed = 20 * h * h * channels + 4800 * h * h
    if session.device.type == "cuda" and needed > torch.cuda.mem_get_info(session.device)[0]:
        yield {"left out, bytes of memory needed": needed, "ok": True}
        return
    source = torch.randn(1, h, h, channels, device=session.device, dtype=torch.bfloat16)
    source = source.permute(0, 3, 1, 2)
    kernel = torch.randn(1, 2 * h, 2 * h, 49, device=session.device).permute(0, 3, 1, 2)
    few, backward = slice(-8, None), torch.ops.featup_hub.jbu_apply_backward
    output = jbu_apply(source, kernel, impl=session.impl)
    part = source[:, few].contiguous()
    expected = jbu_apply(part, kernel, impl=session.impl)
    yield {"pass": "forward", "ok": torch.equal(output[:, few], expected)}
    far = backward(output, source, kernel, True, False, session.impl)[0]
    near = backward(expected, part, kernel, True, False, session.impl)[0]
    yield {"pass": "backward", "ok": torch.equal(far[:, few], near)}


def stack_case(session: Session) -> tuple[JBUStack, Tensor, Tensor, Tensor]:
    """Makes a stack, inputs, and what the definition in float64 makes of them."""
    stack = JBUStack(num_stages=2, joint_first=True).eval().to(session.device)
    source = torch.randn(1, 20, 7, 9).to(session.device)
    image = torch.randn(1, 3, 27, 36).to(session.device)
    with torch.no_grad():
        expected = stack.double()(source.double(), image.double(), impl="reference")
    return stack.float(), source, image, expected


def streams(session: Session) -> Rows:
    """Work on a side stream waits for that stream's past, and for no other's."""
    stack, source, image, expected = stack_case(session)
    side = torch.cuda.Stream(session.device)
    session.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the source is made late, on this stream only
        output = stack(source + 0, image, impl=session.impl)
    free = bool(torch.cuda.default_stream(session.device).query())
    side.synchronize()
    error = relative_error(output, expected)
    yield {"error": error, "default stream stayed free": free, "ok": free and error <= 1e-5}


def graphs(session: Session) -> Rows:
    """A captured stack replays with new inputs, also where its kernels were first used in it."""
    stack, source, image, _ = stack_case(session)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = stack(source, image, impl=session.impl)
    source.copy_(torch.randn_like(source))
    graph.replay()
    session.synchronize()
    with torch.no_grad():
        same = torch.equal(captured, stack(source, image, impl=session.impl))
    yield {"replay equals eager": same, "ok": same}


def threads(session: Session) -> Rows:
    """A thread that never used the device gets the same answer."""
    stack, source, image, expected = stack_case(session)
    found: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(stack(source, image, impl=session.impl).detach())
    )
    thread.start()
    thread.join()
    error = relative_error(found[0], expected) if found else math.inf
    yield {"error": error, "ok": error <= 1e-5}


CHECKS: dict[str, Callable[[Session], Rows]] = {
    "parity": parity,
    "gradients": gradients,
    "joint": joint,
    "every tap": every_tap,
    "offsets": offsets,
}
# First of all a graph: its kernels have not been loaded yet.
CUDA_CHECKS = {"graphs": graphs, "streams": streams, "threads": threads}


def checks(session: Session) -> Rows:
    """Runs all checks. One that breaks fails and does not keep the others from running."""
    for name, check in (CHECKS if session.dry else CUDA_CHECKS | CHECKS).items():
        try:
            for row in check(session):
                yield {"check": name} | row
        except Exception as error:
            yield {"check": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


def sanitize(session: Session) -> Rows:
    """Runs every kernel once per type at small, odd sizes, for a sanitizer to watch."""
    session.dry = True  # tiny shapes, whoever asks
    yield from gradients(session)
    yield from parity(session)
    session.synchronize()


def variant(make: Callable[..., Program], option: str) -> Callable[..., Program]:
    """Returns a function like ``backend.apply_program`` for kernels with a compiler's option."""

    class Variant(Program):
        def contents(self) -> tuple[str, dict[str, str], tuple[str, ...]]:
            text, headers, options = super().contents()
            return text, headers, (*options, option)

    def program(*arguments: Any) -> Program:
        usual = make(*arguments)
        return Variant(usual.source, usual.define, usual.kernels)

    return program


def operations(session: Session) -> Rows:
    """Times the last stage's operations one by one, and variants of the filter."""
    options = ("-DJBU_TENSOR_CORES=0", "-DJBU_TAP_OUTPUTS=1", "-DJBU_TAP_OUTPUTS=4")
    for case in DRY[:1] if session.dry else [CASES[0], CASES[1], CASES[6], CASES[7]]:
        calls, moved = _last_stage(case, session)
        row = {"case": str(case), "bytes of apply": moved}
        with torch.no_grad():
            for name, call in calls.items():
                yield row | {"operation": name} | measure(call, session)
            for option in options:
                make = variant(backend.apply_program, option)
                with mock.patch.object(backend, "apply_program", make):
                    yield row | {"operation": f"apply {option}"} | measure(calls["apply"], session)


def _last_stage(case: Case, session: Session) -> tuple[dict[str, Callable[[], object]], int]:
    (h, w), (height, width) = [-(-n // 2) for n in case.output], case.output
    weights, impl, ops = draw_stage(session), session.impl, torch.ops.featup_hub
    image = torch.randn(case.batch, 3, height, width).to(session.device)
    source = torch.randn(case.batch, h, w, case.channels).to(session.device, DTYPES[case.dtype])
    source = source.permute(0, 3, 1, 2)
    kernel = jbu_kernel(image, weights, impl=impl)
    output = jbu_apply(source, kernel, impl=impl)
    backward, maps = ops.jbu_apply_backward, (output, source, kernel)
    calls: dict[str, Callable[[], object]] = {
        "kernel": lambda: jbu_kernel(image, weights, impl=impl),
        "kernel backward": lambda: ops.jbu_kernel_backward(kernel, image, *weights, impl),
        "apply": lambda: jbu_apply(source, kernel, impl=impl),
        "apply backward, source": lambda: backward(*maps, True, False, impl),
        "apply backward, kernel": lambda: backward(*maps, False, True, impl),
    }
    return calls, sum(x.numel() * x.element_size() for x in maps)


def compiled(session: Session) -> Rows:
    """Times the stack under ``torch.compile``, by the implementations."""
    case = DRY[0] if session.dry else CASES[4]
    for impl in ("torch",) if session.dry else ("torch", "cuda", "reference"):
        torch._dynamo.reset()
        problem = Problem(case, session)
        backend_name = "aot_eager" if session.dry else "inductor"
        stack = torch.compile(problem.stack, fullgraph=True, backend=backend_name)

        def call(stack: Any = stack, problem: Problem = problem, impl: str = impl) -> Tensor:
            with torch.no_grad():
                return stack(problem.source, problem.image, impl=impl)

        start = time.monotonic()
        row: Row = {"case": str(case), "impl": f"{impl}, compiled"}
        row["difference"] = relative_error(call(), problem.forward(impl=impl))
        row["compile_s"] = time.monotonic() - start
        yield row | {"forward": measure(call, session)}


def upstream(session: Session) -> Rows:
    """Times upstream's stack, and says how far ours is from it with the same weights."""
    stack_class = _upstream_stack(session)
    for case in [case for case in CASES if case.dtype == "fp32"][:3]:
        row: Row = {"case": str(case), "impl": "upstream", "floor_bytes": case.forward_bytes()}
        try:
            stack = stack_class(case.channels).eval()
            problem = Problem(case, session, stack)
            row["forward"] = measure(problem.forward, session)
            ours = JBUStack(case.channels)
            ours.load_state_dict(stack.state_dict())
            found = Problem(case, session, ours).forward(impl=session.impl)
            row["difference"] = relative_error(found, problem.forward())
            del found
            row["backward"] = measure(problem.backward(), session)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error)[:200]
        yield row


def _upstream_stack(session: Session) -> Any:
    """Compiles upstream's extension and imports its stack; its CPU extension is never called."""
    from torch.utils import cpp_extension

    assert session.upstream is not None
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    sources = session.upstream / "featup" / "adaptive_conv_cuda"
    packages = Path(torch.__file__).parent.parent
    sys.modules["adaptive_conv_cuda_impl"] = cpp_extension.load(
        "adaptive_conv_cuda_impl",
        [str(sources / name) for name in ("adaptive_conv_cuda.cpp", "adaptive_conv_kernel.cu")],
        build_directory=tempfile.mkdtemp(),
        # A toolkit with nothing but the compiler lacks headers that torch's own wheels bring.
        extra_include_paths=[str(path) for path in packages.glob("nvidia/cu1*/include")],
    )
    sys.modules["adaptive_conv_cpp_impl"] = types.ModuleType("adaptive_conv_cpp_impl")
    sys.path.insert(0, str(session.upstream))
    return importlib.import_module("featup.upsamplers").JBUStack


def profile(session: Session) -> Rows:
    """Runs every kernel once at the main size, in float32 and bfloat16."""
    for case in CASES[:2]:
        Problem(case, session).backward(impl=session.impl)()
    session.synchronize()
    yield {"ok": True}


TASKS: dict[str, Callable[[Session], Rows]] = {
    task.__name__: task for task in (checks, sanitize, operations, compiled, upstream, profile)
}


def main() -> None:
    """Runs one task and prints its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    # Or the definition in float32, which sets the limits, would be a thousand times less exact.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    session = Session(
        device=arguments.device,
        impl="cuda" if arguments.device.type == "cuda" else "torch",
        dry=arguments.dry,
        deadline=math.inf,
        out=Path(),
        upstream=arguments.folder,
    )
    for row in TASKS[arguments.task](session):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
