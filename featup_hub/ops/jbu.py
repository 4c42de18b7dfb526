"""The two operations of a joint bilateral upsampler: checked, dispatched, registered.

``impl`` chooses who computes:

* ``"reference"`` – the definition in :mod:`featup_hub.ops.reference`, plain autograd;
* ``"torch"`` – the folded form in plain PyTorch, fast on a CPU, adjoints written out;
* ``"cuda"`` – the fused kernels; never falls back;
* ``"auto"`` – ``"cuda"`` where it can run, else ``"torch"``.

While a model is exported, the definition is used whatever was asked: it is made of standard
operators that every target knows. Otherwise the operations are opaque to compilers, under the
names ``featup_hub::jbu_kernel`` and ``featup_hub::jbu_apply``.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from featup_hub.ops import reference, torch_path, transforms
from featup_hub.ops.choice import choose
from featup_hub.ops.cuda import backend as cuda
from featup_hub.ops.reference import StageWeights

__all__ = ["Implementation", "jbu_apply", "jbu_kernel"]

Implementation = Literal["auto", "cuda", "torch", "reference"]


def jbu_kernel(guidance: Tensor, weights: StageWeights, *, impl: Implementation = "auto") -> Tensor:
    """Predicts one D×D kernel per pixel from the guidance.

    The formula is that of :func:`featup_hub.ops.reference.jbu_kernel`. Whatever the guidance's
    precision, and under autocast too, kernels are computed in float32 (in float64 for float64
    weights).

    Args:
        guidance: The image at the stage's output size, (B, G, H, W).
        weights: The stage's parameters.
        impl: Who computes.

    Returns:
        Kernels, (B, D², H, W), taps row-major.

    Raises:
        ValueError: If ``guidance`` is not (B, G, H, W) or ``impl`` is unknown.
        TypeError: If its values are integers.
    """
    _check_impl(impl)
    check_floating(guidance, "guidance")
    channels = weights.range_w0.shape[1]
    if guidance.dim() != 4 or guidance.shape[1] != channels:
        raise ValueError(
            f"guidance must be an image with {channels} channels, (B, {channels}, H, W); "
            f"got {tuple(guidance.shape)}, were source and guidance swapped?"
        )
    dtype = torch.promote_types(weights.range_w0.dtype, torch.float32)
    guidance = guidance.to(dtype)
    weights = StageWeights(*(tensor.to(dtype) for tensor in weights))
    with _without_autocast(guidance.device):
        if impl == "reference" or _exporting():
            return reference.jbu_kernel(guidance, weights)
        return torch.ops.featup_hub.jbu_kernel(guidance, *weights, impl)


def jbu_apply(
    source: Tensor, kernel: Tensor, bias: Tensor | None = None, *, impl: Implementation = "auto"
) -> Tensor:
    """Resizes the source to the kernels' size and filters it, every channel alike.

    The formula is that of :func:`featup_hub.ops.reference.jbu_apply`; sums are in float32 or
    better, the result has the source's precision.

    Args:
        source: Low-resolution features, (B, C, h, w), any memory format.
        kernel: Kernels, (B, D², H, W).
        bias: Added to every output pixel, (C,).
        impl: Who computes.

    Returns:
        Features, (B, C, H, W).

    Raises:
        ValueError: If the shapes do not fit one another or ``impl`` is unknown.
        TypeError: If the source's values are integers.
    """
    _check_impl(impl)
    check_floating(source, "source")
    if source.dim() != 4 or kernel.dim() != 4 or source.shape[0] != kernel.shape[0]:
        raise ValueError(
            "source (B, C, h, w) and kernel (B, D², H, W) must be maps of one batch size; "
            f"got {tuple(source.shape)} and {tuple(kernel.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(source.dtype, kernel.dtype), torch.float32)
    kernel = kernel.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    with _without_autocast(source.device):
        if impl == "reference" or _exporting():
            return reference.jbu_apply(source.to(dtype), kernel, bias).to(source.dtype)
        return torch.ops.featup_hub.jbu_apply(source, kernel, bias, impl)


def check_floating(values: Tensor, name: str) -> None:
    """Refuses integers: colours from 0 to 255 would give kernels, too, of another image.

    Args:
        values: The guidance or the source.
        name: Which of them.

    Raises:
        TypeError: If they are integers.
    """
    if not values.is_floating_point():
        raise TypeError(
            f"{name} must be floating-point, an image normalised RGB; got {values.dtype}; divide "
            "an image by 255, subtract the mean and divide by the deviation"
        )


def _check_impl(impl: str) -> None:
    if impl not in get_args(Implementation):
        names = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(f"impl must be one of {names}; got {impl!r}")


def _exporting() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7
    return bool(exporting() or torch.onnx.is_in_onnx_export())


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


_library = torch.library.Library("featup_hub", "DEF")
_WEIGHTS = ", ".join(f"Tensor {name}" for name in StageWeights._fields)
_GRADIENTS = ", ".join(["Tensor"] * (1 + len(StageWeights._fields)))
_library.define(f"jbu_kernel(Tensor guidance, {_WEIGHTS}, str impl) -> Tensor")
_library.define(
    f"jbu_kernel_backward(Tensor grad, Tensor guidance, {_WEIGHTS}, str impl) -> ({_GRADIENTS})"
)
_library.define("jbu_apply(Tensor source, Tensor kernel, Tensor? bias, str impl) -> Tensor")
_library.define(
    "jbu_apply_backward(Tensor grad, Tensor source, Tensor kernel, bool need_source, "
    "bool need_kernel, str impl) -> (Tensor, Tensor)"
)


def _kernel(guidance: Tensor, *args: Any) -> Tensor:
    if guidance.numel() == 0:
        got = tuple(guidance.shape)
        raise ValueError(f"guidance must hold at least one image; got {got}; skip empty batches")
    weights, impl = StageWeights(*args[:-1]), args[-1]
    return choose(impl, cuda.kernel_unsupported_reason, guidance, weights).kernel(guidance, weights)


def _kernel_backward(grad: Tensor, guidance: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # On every device: nearly all of it is matrix products.
    weights = StageWeights(*args[:-1])
    grad_guidance, gradients = torch_path.kernel_backward(grad, guidance, weights)
    return grad_guidance, *gradients


def _apply(source: Tensor, kernel: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return choose(impl, cuda.apply_unsupported_reason, source, kernel).apply(source, kernel, bias)


def _apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool, impl: str
) -> tuple[Tensor, Tensor]:
    backend = choose(impl, cuda.apply_unsupported_reason, source, kernel)
    return backend.apply_backward(grad, source, kernel, need_source, need_kernel)


for _name, _function in (
    ("jbu_kernel", _kernel),
    ("jbu_kernel_backward", _kernel_backward),
    ("jbu_apply", _apply),
    ("jbu_apply_backward", _apply_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _channels_last_empty(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    return like.new_empty(like.shape[0], *size, channels).permute(0, 3, 1, 2)


def _fake_kernel(guidance: Tensor, *args: Any) -> Tensor:
    taps = StageWeights(*args[:-1]).fixup_b1.shape[0]
    return _channels_last_empty(guidance, taps, (guidance.shape[2], guidance.shape[3]))


def _fake_kernel_backward(grad: Tensor, guidance: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (guidance, *args[:-1])
    )


def _fake_apply(source: Tensor, kernel: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return _channels_last_empty(source, source.shape[1], (kernel.shape[2], kernel.shape[3]))


def _fake_apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool, impl: str
) -> tuple[Tensor, Tensor]:
    grad_source, grad_kernel = source.new_empty(0), kernel.new_empty(0)
    if need_source:
        grad_source = _channels_last_empty(
            source, source.shape[1], (source.shape[2], source.shape[3])
        )
    if need_kernel:
        grad_kernel = _channels_last_empty(
            kernel, kernel.shape[1], (kernel.shape[2], kernel.shape[3])
        )
    return grad_source, grad_kernel


torch.library.register_fake("featup_hub::jbu_kernel", _fake_kernel, lib=_library)
torch.library.register_fake("featup_hub::jbu_kernel_backward", _fake_kernel_backward, lib=_library)
torch.library.register_fake("featup_hub::jbu_apply", _fake_apply, lib=_library)
torch.library.register_fake("featup_hub::jbu_apply_backward", _fake_apply_backward, lib=_library)


def _save_kernel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.impl = inputs[-1]


def _kernel_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.featup_hub.jbu_kernel_backward
    return *backward(grad, *ctx.saved_tensors, ctx.impl), None


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, kernel, _bias, ctx.impl = inputs
    ctx.save_for_backward(source, kernel)


def _apply_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_source, need_kernel, need_bias, _ = ctx.needs_input_grad
    backward = torch.ops.featup_hub.jbu_apply_backward
    source, kernel = backward(grad, *ctx.saved_tensors, need_source, need_kernel, ctx.impl)
    bias = grad.sum((0, 2, 3), dtype=ctx.saved_tensors[1].dtype) if need_bias else None
    return source if need_source else None, kernel if need_kernel else None, bias, None


torch.library.register_autograd(
    "featup_hub::jbu_kernel", _kernel_gradients, setup_context=_save_kernel, lib=_library
)
torch.library.register_autograd(
    "featup_hub::jbu_apply", _apply_gradients, setup_context=_save_apply, lib=_library
)
for _name in ("jbu_kernel", "jbu_apply"):
    transforms.register_vmap(f"featup_hub::{_name}", _library)
    transforms.refuse_derivatives(f"featup_hub::{_name}_backward", _library)
