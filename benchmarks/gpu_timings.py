"""How long a stack takes on a GPU, beside the time its bytes alone would take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu_session import DTYPES, Session, measure
from featup_hub.ops import Implementation, jbu_apply, jbu_kernel
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.programs import Program
from featup_hub.upsamplers import JBUStack, stage_sizes

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of the problem.

    Attributes:
        source: Side of the square source.
        output: Side of the square output.
        channels: Feature channels.
        batch: Samples.
        dtype: Of the features, a key of ``DTYPES``.
    """

    source: int
    output: int
    channels: int = 384
    batch: int = 1
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.source}→{self.output} C={self.channels} B={self.batch} {self.dtype}"

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Sides of each stage's source and output."""
        outputs = [n for n, _ in stage_sizes((self.source,) * 2, (self.output,) * 2)]
        return list(zip([self.source, *outputs[:-1]], outputs, strict=True))

    def forward_bytes(self) -> int:
        """Bytes a stack must move: every map read once and written once, kernels in float32.

        Kernels are written by one operation and read by the next.
        """
        width = DTYPES[self.dtype].itemsize
        maps = sum(n * n + m * m for n, m in self.sizes) * self.channels * width
        kernels = sum(m * m * (2 * 49 + 3) for _, m in self.sizes) * 4
        return self.batch * (maps + kernels)

    def backward_bytes(self) -> int:
        """Bytes its adjoint must move.

        The output's gradient and the source are read and the source's gradient is written;
        kernels are read, their gradient written and read.
        """
        width = DTYPES[self.dtype].itemsize
        maps = sum(2 * n * n + m * m for n, m in self.sizes) * self.channels * width
        kernels = sum(m * m * (3 * 49 + 6) for _, m in self.sizes) * 4
        return self.batch * (maps + kernels)

    def memory_bytes(self) -> int:
        """A generous guess of the memory that timing forward and backward takes."""
        return 4 * self.backward_bytes()


SIZES = ((14, 224), (28, 448), (32, 512), (16, 224), (64, 1024))
FIRST = [Case(source=n, output=m, dtype=d) for n, m in SIZES[:3] for d in ("fp32", "bf16")]
GRID = [
    Case(source=n, output=m, channels=c, batch=b, dtype=d)
    for b in (1, 32)
    for n, m in SIZES
    for c in (384, 768, 1024)
    for d in DTYPES
]
DRY = [Case(source=2, output=7, channels=8), Case(source=2, output=8, channels=8, batch=2)]


class Problem:
    """A stack and inputs of one size.

    Args:
        case: The size.
        session: The session.
        stack: The upsampler (source, image) -> features; default: ours.
    """

    def __init__(self, case: Case, session: Session, stack: nn.Module | None = None) -> None:
        generator = torch.Generator(session.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=session.device)

        self.stack = (stack or JBUStack(num_stages=len(case.sizes))).eval().to(session.device)
        source = normal(case.batch, case.channels, case.source, case.source)
        self.source = source.to(DTYPES[case.dtype]).requires_grad_()
        self.image = normal(case.batch, 3, case.output, case.output)
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


def bandwidth(session: Session) -> float:
    """Returns bytes per second, read and written, of a large copy within the device."""
    count = 1 << (16 if session.dry else 28)
    source = torch.randn(count, device=session.device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), session)
    return 8 * count / (timing.best_ms / 1000)


def time_case(case: Case, session: Session, speed: float, impl: Implementation) -> Row:
    """Times a stack forward and backward, with its floors at a bandwidth of ``speed``."""
    problem = Problem(case, session)
    row: Row = {"case": str(case), "impl": impl, **asdict(case)}
    forward = measure(lambda: problem.forward(impl=impl), session)
    row |= {f"forward_{key}": value for key, value in asdict(forward).items()}
    row["forward_floor_ms"] = 1000 * case.forward_bytes() / speed
    if session.device.type == "cuda" and impl == "cuda":
        row["graph_ms"] = _graph_ms(problem, session)
    backward = measure(problem.backward(impl=impl), session)
    row |= {f"backward_{key}": value for key, value in asdict(backward).items()}
    row["backward_floor_ms"] = 1000 * case.backward_bytes() / speed
    return row


def _graph_ms(problem: Problem, session: Session) -> float:
    """Times the forward pass without the host's share, as a replayed graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.forward(impl="cuda")
    return measure(graph.replay, session).median_ms


def time_operations(case: Case, session: Session, speed: float) -> list[Row]:
    """Times the last stage's operations one by one, with the floor of each."""
    n, m = case.sizes[-1]
    width, b, c = DTYPES[case.dtype].itemsize, case.batch, case.channels
    weights = session.weights()
    image = torch.randn(b, 3, m, m, device=session.device)
    source = torch.randn(b, n, n, c, device=session.device, dtype=DTYPES[case.dtype])
    source = source.permute(0, 3, 1, 2)
    impl = session.impl
    kernel = jbu_kernel(image, weights, impl=impl)
    output = jbu_apply(source, kernel, impl=impl)
    ops, pixels, maps = torch.ops.featup_hub, b * m * m, b * c * width
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "kernel": (lambda: jbu_kernel(image, weights, impl=impl), pixels * 4 * 52),
        "apply": (
            lambda: jbu_apply(source, kernel, impl=impl),
            maps * (n * n + m * m) + pixels * 4 * 49,
        ),
        "apply backward, source": (
            lambda: ops.jbu_apply_backward(output, source, kernel, True, False, impl),
            maps * (n * n + m * m) + pixels * 4 * 49,
        ),
        "apply backward, kernel": (
            lambda: ops.jbu_apply_backward(output, source, kernel, False, True, impl),
            maps * (n * n + m * m) + pixels * 4 * 49,
        ),
        "kernel backward": (
            lambda: ops.jbu_kernel_backward(kernel, image, *weights, impl),
            pixels * 4 * (49 + 6),
        ),
    }
    if case.dtype != "fp32":
        calls["apply, no tensor cores"] = (_plainly(calls["apply"][0]), calls["apply"][1])
    rows = []
    with torch.no_grad():
        for name, (call, moved) in calls.items():
            timing = measure(call, session, seconds=0.15)
            floor = 1000 * moved / speed
            rows.append({"case": str(case), "operation": name, **asdict(timing), "floor_ms": floor})
    return rows


class PlainProgram(Program):
    """A program compiled to do without tensor cores."""

    def contents(self) -> tuple[str, dict[str, str], tuple[str, ...]]:
        """See :class:`Program`."""
        text, headers, options = super().contents()
        return text, headers, (*options, "-DJBU_TENSOR_CORES=0")


APPLY_PROGRAM = backend.apply_program  # the package's own, whatever stands in its place


def plain_program(dtype: torch.dtype) -> PlainProgram:
    """Returns the program that filters features of a dtype without tensor cores."""
    program = APPLY_PROGRAM(dtype)
    return PlainProgram(program.source, program.define, program.kernels)


def _plainly(call: Callable[[], object]) -> Callable[[], object]:
    def plain() -> object:
        with mock.patch.object(backend, "apply_program", plain_program):
            return call()

    return plain
