"""The operations of a joint bilateral upsampler, with checked arguments.

Arguments are checked and converted here; the operators are registered with torch in
:mod:`featup_hub.ops.registration`. ``impl`` chooses the implementation:

* ``"reference"`` – the definition in :mod:`featup_hub.ops.reference`, plain autograd;
* ``"torch"`` – the folded form in plain PyTorch, fast on a CPU, adjoints written out;
* ``"cuda"`` – the fused kernels; never falls back (the gradients of :func:`jbu_kernel` are plain
  PyTorch);
* ``"auto"`` – ``"cuda"`` if it can run, else ``"torch"``.

Export, tracing and forward-mode differentiation always use the definition, whatever ``impl`` is: it
consists of standard operators, so a file runs without this package.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from featup_hub.ops import reference, registration  # noqa: F401  (it registers the operators)
from featup_hub.ops.reference import StageWeights

Implementation = Literal["auto", "cuda", "torch", "reference"]

_LARGEST = 20  # no usual normalisation gives a value this large


def jbu_kernel(guidance: Tensor, weights: StageWeights, *, impl: Implementation = "auto") -> Tensor:
    """Predicts one D×D kernel per pixel from the guidance.

    See :func:`featup_hub.ops.reference.jbu_kernel` for the formula and shapes. Kernels are computed
    in float32 (in float64 for float64 weights), for any precision of the guidance and under
    autocast.

    Raises:
        ValueError: If ``guidance`` is not (B, G, H, W) or ``impl`` is unknown.
        TypeError: If its values are integers.
    """
    _check_impl(impl)
    check_floating(guidance, "guidance")
    _check_device(guidance=guidance, weights=weights.range_w0)
    channels = weights.range_w0.shape[1]
    if guidance.dim() != 4 or guidance.shape[1] != channels:
        raise ValueError(
            f"guidance must be an image with {channels} channels, (B, {channels}, H, W); "
            f"got {tuple(guidance.shape)}, were source and guidance swapped?"
        )
    dtype = torch.promote_types(weights.range_w0.dtype, torch.float32)
    guidance = guidance.to(dtype)
    weights = StageWeights(*(tensor.to(dtype) for tensor in weights))
    with without_autocast(guidance.device):
        if impl == "reference" or _traced():
            return reference.jbu_kernel(guidance, weights)
        return torch.ops.featup_hub.jbu_kernel(guidance, *weights, impl)


def jbu_apply(
    source: Tensor, kernel: Tensor, bias: Tensor | None = None, *, impl: Implementation = "auto"
) -> Tensor:
    """Resizes the source to the kernels' size and filters it, every channel alike.

    See :func:`featup_hub.ops.reference.jbu_apply` for the formula and shapes. Sums are in float32
    or better; the result has the source's precision.

    Raises:
        ValueError: If the shapes do not match or ``impl`` is unknown.
        TypeError: If the source's values are integers.
    """
    _check_impl(impl)
    check_floating(source, "source")
    check_floating(kernel, "kernel")
    _check_device(source=source, kernel=kernel)
    if source.dim() != 4 or kernel.dim() != 4 or source.shape[0] != kernel.shape[0]:
        raise ValueError(
            "source (B, C, h, w) and kernel (B, D², H, W) must be maps of one batch size; "
            f"got {tuple(source.shape)} and {tuple(kernel.shape)}"
        )
    taps = int(kernel.shape[1])  # a tensor while torch.jit traces
    if round(taps**0.5) ** 2 != taps or taps % 2 == 0:
        raise ValueError(f"a kernel has D² taps with D odd, such as 49; got {taps}")
    dtype = torch.promote_types(torch.promote_types(source.dtype, kernel.dtype), torch.float32)
    kernel = kernel.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    with without_autocast(source.device):
        if impl == "reference" or _traced():
            return reference.jbu_apply(source.to(dtype), kernel, bias).to(source.dtype)
        return torch.ops.featup_hub.jbu_apply(source, kernel, bias, impl)


def joint_kernel(
    query: Tensor,
    key: Tensor,
    spatial: Tensor,
    range: Tensor,
    *,
    cells: tuple[int, int],
    radius: int,
    impl: Implementation = "auto",
) -> Tensor:
    """Weights the cells around every pixel by distance and by likeness of embeddings.

    See :func:`featup_hub.ops.reference.joint_kernel` for the formula and shapes.
    """
    spatial, range = spatial.to(query), range.to(query)
    if impl == "reference" or _traced():
        return reference.joint_kernel(query, key, spatial, range, cells, radius)
    return torch.ops.featup_hub.joint_kernel(query, key, spatial, range, *cells, radius, impl)


def pool_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes an image, (B, C, H, W), as :func:`featup_hub.ops.reference.pool_guidance` does."""
    # torch's own operator neither compiles nor exports with symbolic sizes, and its gradient on a
    # GPU is not deterministic.
    if _traced() or (image.is_cuda and image.requires_grad):
        return reference.pool_guidance(image, size)
    if torch.compiler.is_compiling():
        return torch.ops.featup_hub.pool_guidance(image, *size)
    return F.adaptive_avg_pool2d(image, size)


def check_floating(values: object, name: str) -> None:
    """Raises TypeError unless the values are a tensor of floating-point numbers.

    Colours from 0 to 255 would give wrong kernels without an error.
    """
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} must be a tensor; got {type(values).__name__}; "
            "model.preprocess(photo) makes one of an image"
        )
    if not values.is_floating_point():
        raise TypeError(
            f"{name} must be floating-point, an image normalised RGB; got {values.dtype}; divide "
            "an image by 255, subtract the mean and divide by the deviation"
        )


def check_numbers(least: int, **numbers: object) -> None:
    """Raises ValueError unless all are whole numbers of at least ``least``."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or number < least:
            raise ValueError(f"{name} must be at least {least}, a whole number; got {number!r}")


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError unless both are one number a channel, RGB, those of ``std`` not zero."""
    if not all(hasattr(values, "__len__") and len(values) == 3 for values in (mean, std)) or (
        0 in std
    ):
        raise ValueError(
            "mean and std must be three numbers each, none of std zero, such as model.mean and "
            f"model.std; got {mean} and {std}"
        )


def warn_unless_normalised(image: Tensor, *, stacklevel: int = 5) -> bool:
    """Warns of an image that is not normalised, because features would be silently wrong.

    Returns:
        Whether the values could be read. Reading them would break tracing, vmap and the capture of
        CUDA graphs.
    """
    if (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or type(image) is not Tensor
        or image.is_meta
        or not image.numel()
        or torch._C._functorch.is_functorch_wrapped_tensor(image)
        or (image.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return False
    low, high = (float(value) for value in image.detach().aminmax())
    if high > _LARGEST or 0 <= low < high <= 1:
        warnings.warn(
            f"the image has values from {low:.3g} to {high:.3g}, which do not look normalised; "
            "use model.preprocess(photo), or bring the image to [0, 1], subtract the mean and "
            "divide by the standard deviation, as for ImageNet",
            stacklevel=stacklevel,
        )
    return True


def _check_device(**tensors: Tensor) -> None:
    """Refuses tensors on several devices: a kernel would read wrong addresses."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = " and ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors on one device are needed; got {places}; move one: x.to(device)")


def _check_impl(impl: str) -> None:
    if impl not in get_args(Implementation):
        names = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(f"impl must be one of {names}; got {impl!r}")


_kept_whole = False


@contextlib.contextmanager
def keep_whole() -> Iterator[None]:
    """Exports the operators as they are, for :mod:`featup_hub.ops.onnx` to write."""
    global _kept_whole
    before, _kept_whole = _kept_whole, True
    try:
        yield
    finally:
        _kept_whole = before


def _traced() -> bool:
    """Whether a model is being exported, traced or differentiated in forward mode."""
    return bool(
        (reference.exporting() and not _kept_whole)
        or torch.onnx.is_in_onnx_export()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0  # registered operators would give zero
    )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turns autocast off, where it is on."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
