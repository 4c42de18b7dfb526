"""Correctness on a GPU: parity, gradients, layouts, streams, graphs, threads, devices, offsets.

Each check draws fresh inputs, compares with the definition in float64, and returns rows; a row
whose ``ok`` is false is a failure. New memory holds NaN, so what a kernel does not write shows.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_session import DTYPES, Session, relative_error
from featup_hub.ops import Implementation, StageWeights, jbu_apply, jbu_kernel
from featup_hub.upsamplers import JBUStack

Row = dict[str, Any]

# The definition has rounding errors of its own, in the features' precision or where it is badly
# conditioned; nobody is asked to be better. Elsewhere the sums of float32 set the limit: the
# largest errors seen in 1000 draws on a CPU were 4e-6 of kernels and 2.4e-5 of gradients, where a
# few pixels' terms cancel.
SLACK, ROUNDING, GRADIENT_ROUNDING = 4.0, 1e-5, 5e-5


def limit(own_error: float, rounding: float = ROUNDING) -> float:
    """Returns the largest error allowed where the definition itself makes one of this size."""
    return max(SLACK * own_error, rounding)


LAYOUTS = ("contiguous", "channels_last", "sliced")


def poison(session: Session) -> None:
    """Fills memory that is about to be handed out again with NaN."""
    if session.device.type == "cuda":
        blocks = [
            torch.full((1 << power,), float("nan"), device=session.device)
            for power in range(8, 25)
            for _ in range(3)
        ]
        del blocks


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Returns the same values in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full(
            (x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 1), float("nan")
        )
        view = wide.to(x)[:, 1:, 1:-1, :-1]
        return view.copy_(x)
    return x


def draw_case(session: Session, index: int) -> tuple[Row, Tensor, Tensor, Tensor | None]:
    """Draws source, guidance and bias of random sizes, every ratio and layout in turn."""
    low, high = (1, 4) if session.dry else (1, 40)
    batch, channels = session.integer(1, 3), session.integer(1, 9 if session.dry else 300)
    h, w = session.integer(low, high), session.integer(low, high)
    ratio = (2, 2, 1, 1.75)[index % 4]
    if index % 4 == 0:  # half precision is doubled on tensor cores where channels come in eights
        channels = 8 * -(-channels // 8)
    height, width = max(int(ratio * h), 1), max(int(ratio * w), 1)
    dtype = list(DTYPES.values())[index % 3]
    layout = LAYOUTS[session.integer(0, 2)]
    source = lay_out(session.normal(batch, channels, h, w, dtype=dtype), layout)
    guidance = lay_out(session.normal(batch, 3, height, width), layout)
    bias = session.normal(channels) if index % 2 else None
    row = {
        "source": list(source.shape),
        "output": [height, width],
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
    }
    return row, source, guidance, bias


def doubled(weights: StageWeights) -> StageWeights:
    """Returns weights in float64."""
    return StageWeights(*(tensor.double() for tensor in weights))


def parity(session: Session) -> list[Row]:
    """Both operations against the definition in float64, random shapes, twice the same bits."""
    rows = []
    for index in range(9 if session.dry else 60):
        row, source, guidance, bias = draw_case(session, index)
        weights = session.weights()
        exact = jbu_kernel(guidance.double(), doubled(weights), impl="reference")
        own = relative_error(jbu_kernel(guidance, weights, impl="reference"), exact)
        poison(session)
        kernel = jbu_kernel(guidance, weights, impl=session.impl)
        row["kernel_error"] = relative_error(kernel, exact)
        ok = row["kernel_error"] <= limit(own)

        wide = None if bias is None else bias.double()
        exact = jbu_apply(source.double(), kernel.double(), wide, impl="reference")
        own = relative_error(jbu_apply(source, kernel, bias, impl="reference"), exact)
        poison(session)
        output = jbu_apply(source, kernel, bias, impl=session.impl)
        row["output_error"] = relative_error(output, exact)
        ok = ok and row["output_error"] <= limit(own)
        same = torch.equal(output, jbu_apply(source, kernel, bias, impl=session.impl))
        rows.append(row | {"deterministic": same, "ok": ok and same})
    return rows


def gradients(session: Session) -> list[Row]:
    """Every gradient against autograd through the definition in float64, twice the same bits."""
    rows = []
    for index in range(4 if session.dry else 40):
        row, source, guidance, bias = draw_case(session, index)
        slope = session.normal(*source.shape[:2], *guidance.shape[-2:], dtype=source.dtype)
        inputs = [source, guidance, *session.weights()]
        exact = _gradients([tensor.double() for tensor in inputs], bias, slope, "reference")
        own = _gradients(inputs, bias, slope, "reference")
        poison(session)
        found = _gradients(inputs, bias, slope, session.impl)
        again = _gradients(inputs, bias, slope, session.impl)
        errors, own_errors = _gradient_errors(found, exact), _gradient_errors(own, exact)
        allowed = limit(max(own_errors), GRADIENT_ROUNDING)
        names = ["source", "guidance", *StageWeights._fields, "bias"]
        row |= {"worst": names[errors.index(max(errors))], "error": max(errors), "limit": allowed}
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        rows.append(row | {"deterministic": same, "ok": max(errors) <= allowed and same})
    return rows


def _gradient_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Returns each gradient's error, relative to its largest entry.

    Weights' gradients are sums over all pixels that may cancel, down to nothing where all pixels
    are alike; they are measured against the largest of any weight.
    """
    first, last = 2, 2 + len(StageWeights._fields)
    scale = max(float(tensor.abs().max()) for tensor in exact[first:last])
    errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    for i in range(first, last):
        error = float((found[i].double() - exact[i]).abs().max()) / scale
        errors[i] = error if error == error else float("inf")
    return errors


def _gradients(
    inputs: list[Tensor], bias: Tensor | None, slope: Tensor, impl: Implementation
) -> list[Tensor]:
    """Returns the gradients of source, guidance, all weights and, if there is one, the bias."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    source, guidance, *weights = inputs
    if bias is not None:
        bias = bias.to(weights[0].dtype).requires_grad_()
        inputs.append(bias)
    kernel = jbu_kernel(guidance, StageWeights(*weights), impl=impl)
    output = jbu_apply(source, kernel, bias, impl=impl)
    return list(torch.autograd.grad(output, inputs, slope.to(output.dtype)))


def joint_stage(session: Session) -> list[Row]:
    """A stack with a joint bilateral stage gives what the definition gives."""
    stack, source, image, expected = _stack_case(session, joint_first=True)
    with torch.no_grad():
        error = relative_error(stack(source, image, impl=session.impl), expected)
    return [{"error": error, "ok": error <= 1e-5}]


def every_tap(session: Session) -> list[Row]:
    """Each of the 49 taps of each pixel gets a gradient."""
    source, kernel = session.normal(2, 5, 6, 7), session.normal(2, 49, 12, 14).requires_grad_()
    output = jbu_apply(source, kernel, impl=session.impl)
    (slope,) = torch.autograd.grad(output.square().sum(), kernel)
    share = float((slope != 0).float().mean())
    return [{"share of taps with a gradient": share, "ok": share == 1.0}]


def streams(session: Session) -> list[Row]:
    """Work on a side stream waits for that stream's past, and for no other's."""
    stack, source, image, expected = _stack_case(session)
    side = torch.cuda.Stream(session.device)
    session.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the source is made late, on this stream only
        late = source + 0
        output = stack(late, image, impl=session.impl)
    free = bool(torch.cuda.default_stream(session.device).query())
    side.synchronize()
    error = relative_error(output, expected)
    return [{"error": error, "default stream stayed free": free, "ok": free and error <= 1e-5}]


def graphs(session: Session) -> list[Row]:
    """A captured stack, forward and backward, replays with new inputs."""
    stack, source, image, _ = _stack_case(session)
    source.requires_grad_()
    slope = torch.ones(1, source.shape[1], *image.shape[-2:], device=session.device)
    inputs = [source, *stack.parameters()]

    def step() -> tuple[Tensor, ...]:
        output = stack(source, image, impl=session.impl)
        return output, *torch.autograd.grad(output, inputs, slope)

    side = torch.cuda.Stream(session.device)
    side.wait_stream(torch.cuda.current_stream(session.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(session.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        source.copy_(session.normal(*source.shape))
        image.copy_(session.normal(*image.shape))
    graph.replay()
    session.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    return [{"replay equals eager": same, "ok": same}]


def threads(session: Session) -> list[Row]:
    """A thread that never used the device gets the same answer."""
    stack, source, image, expected = _stack_case(session)
    found: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(stack(source, image, impl=session.impl).detach())
    )
    thread.start()
    thread.join()
    session.synchronize()
    error = relative_error(found[0], expected) if found else float("inf")
    return [{"error": error, "ok": error <= 1e-5}]


def devices(session: Session) -> list[Row]:
    """Tensors on another device than the current one are computed there."""
    if torch.cuda.device_count() < 2:
        session.notes.append("devices: this machine has one")
        return []
    stack, source, image, expected = _stack_case(session)
    other = torch.device("cuda", 1)
    output = stack.to(other)(source.to(other), image.to(other), impl=session.impl)
    error = relative_error(output.to(session.device), expected)
    return [{"error": error, "ok": error <= 1e-5}]


def offsets(session: Session) -> list[Row]:
    """More than 2^31 elements: the far end is right, forward and backward."""
    h, channels = (2, 8) if session.dry else (736, 1024)  # 2.2e9 outputs, 4.4 GB in bfloat16
    needed = 2 * 2 * 5 * h * h * channels + 4 * 300 * 4 * h * h
    if session.device.type == "cuda" and needed > torch.cuda.mem_get_info(session.device)[0]:
        session.notes.append(f"offsets: needs {needed / 1e9:.0f} GB of free memory")
        return []
    source = torch.randn(1, h, h, channels, device=session.device, dtype=torch.bfloat16)
    source = source.permute(0, 3, 1, 2)
    kernel = torch.randn(1, 2 * h, 2 * h, 49, device=session.device).permute(0, 3, 1, 2)
    output = jbu_apply(source, kernel, impl=session.impl)
    few = slice(-8, None)
    expected = jbu_apply(source[:, few].contiguous(), kernel, impl=session.impl)
    rows = [{"elements": output.numel(), "pass": "forward"}]
    rows[0]["ok"] = torch.equal(output[:, few], expected)
    backward = torch.ops.featup_hub.jbu_apply_backward
    slopes = [
        backward(grad, maps, kernel, True, False, session.impl)[0]
        for grad, maps in ((output, source), (expected, source[:, few].contiguous()))
    ]
    rows.append({"elements": output.numel(), "pass": "backward", "ok": True})
    rows[1]["ok"] = torch.equal(slopes[0][:, few], slopes[1])
    return rows


def _stack_case(
    session: Session, *, joint_first: bool = False
) -> tuple[JBUStack, Tensor, Tensor, Tensor]:
    """Makes a stack, inputs, and what the definition in float64 makes of them."""
    with session.seeded():
        stack = JBUStack(num_stages=2, joint_first=joint_first).eval().to(session.device)
    source, image = session.normal(1, 20, 7, 9), session.normal(1, 3, 28, 36)
    with torch.no_grad():
        expected = stack.double()(source.double(), image.double(), impl="reference")
    return stack.float(), source, image, expected


CHECKS = {
    "parity": parity,
    "gradients": gradients,
    "every tap": every_tap,
    "joint stage": joint_stage,
    "offsets": offsets,
}
CUDA_CHECKS = {"streams": streams, "graphs": graphs, "threads": threads, "devices": devices}
