"""Registers the operators with torch: schemas, gradients, shapes for compilers, vmap.

They are in ``torch.ops.featup_hub`` and are opaque to compilers. A backward pass is a separate
operator without a derivative. ``torch.func.grad`` and similar transforms do not work with
registered operators; use ``impl="reference"`` for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import reference
from featup_hub.ops.choice import run
from featup_hub.ops.reference import StageWeights

# torch allows one of a name; when this module is reloaded, it is kept, with its operators.
_library = globals().get("_library") or torch.library.Library("featup_hub", "DEF")
_WEIGHTS = ", ".join(f"Tensor {name}" for name in StageWeights._fields)
_GRADIENTS = ", ".join(["Tensor"] * (1 + len(StageWeights._fields)))


def _kernel(guidance: Tensor, *args: Any) -> Tensor:
    if guidance.numel() == 0:
        got = tuple(guidance.shape)
        raise ValueError(f"guidance must hold at least one image; got {got}; skip empty batches")
    weights, impl = StageWeights(*args[:-1]), args[-1]
    return _own(run(impl, "kernel", guidance, weights))


def _kernel_backward(grad: Tensor, guidance: Tensor, *args: Any) -> tuple[Tensor, ...]:
    # The same on every device: nearly all time is spent in matrix products.
    weights = StageWeights(*args[:-1])
    grad_guidance, gradients = run("torch", "kernel_backward", grad, guidance, weights)
    return grad_guidance, *gradients


def _apply(source: Tensor, kernel: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return _own(run(impl, "apply", source, kernel, bias))


def _apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return run(impl, "apply_backward", grad, source, kernel, need_source, need_kernel)


def _joint(query: Tensor, key: Tensor, spatial: Tensor, range: Tensor, *args: Any) -> Tensor:
    rows, columns, radius, impl = args
    return _own(run(impl, "joint_kernel", query, key, spatial, range, (rows, columns), radius))


def _joint_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, spatial, range, *cells = args
    return run("torch", "joint_kernel_backward", grad, query, key, spatial, range, tuple(cells))


def _pool(image: Tensor, height: int, width: int) -> Tensor:
    return F.adaptive_avg_pool2d(image, (height, width)).contiguous()


def _own(output: Tensor) -> Tensor:
    """Returns a permuted map that is no view: autograd does not let users change views in place."""
    place = output.untyped_storage(), output.storage_offset(), output.shape, output.stride()
    return output.new_empty(0).set_(*place)


def _map_like(like: Tensor, channels: int) -> Tensor:
    """Returns an empty map of the same size in channels_last memory format."""
    batch, _, height, width = like.shape
    return like.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _fake_kernel(guidance: Tensor, *args: Any) -> Tensor:
    return _map_like(guidance, StageWeights(*args[:-1]).fixup_b1.shape[0])


def _fake_kernel_backward(grad: Tensor, guidance: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (guidance, *args[:-1]))


def _fake_apply(source: Tensor, kernel: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return _map_like(kernel, source.shape[1]).to(source.dtype)


def _fake_apply_backward(
    grad: Tensor, source: Tensor, kernel: Tensor, need_source: bool, need_kernel: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return (
        _map_like(source, source.shape[1]) if need_source else source.new_empty(0),
        _map_like(kernel, kernel.shape[1]) if need_kernel else kernel.new_empty(0),
    )


def _fake_joint(query: Tensor, *args: Any) -> Tensor:
    batch, _, height, width = query.shape
    return query.new_empty(batch, (2 * args[-2] + 1) ** 2, height, width)


def _fake_joint_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    query, key, spatial, range, *_ = args
    maps = _map_like(query, query.shape[1]), _map_like(key, key.shape[1])
    return *maps, spatial.new_empty(()), range.new_empty(())


def _fake_pool(image: Tensor, height: int, width: int) -> Tensor:
    return image.new_empty(image.shape[0], image.shape[1], height, width)


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


def _save_joint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rows, ctx.columns, _radius, _impl = inputs
    ctx.save_for_backward(*tensors)


def _joint_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.featup_hub.joint_kernel_backward
    return *backward(grad, *ctx.saved_tensors, ctx.rows, ctx.columns), None, None, None, None


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, *ctx.size = inputs
    ctx.image_size = image.shape[2:]


def _pool_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns = reference.pooling_matrices(ctx.image_size, ctx.size, grad)
    return rows.t() @ grad @ columns, None, None


def _refuse_gradients(ctx: Any, *grads: Tensor) -> None:  # torch would treat them as zero
    raise RuntimeError(
        "second derivatives were asked for, and only the definition has them; use impl='reference'"
    )


def _call_each_sample(name: str) -> Any:
    """Returns the vmap rule of an operator: call it once for each entry of the mapped axis."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        call = getattr(torch.ops.featup_hub, name)
        chosen = [
            [
                x if axis is None else x.select(axis, i)
                for x, axis in zip(args, in_dims, strict=True)
            ]
            for i in range(info.batch_size)
        ]
        return torch.stack([call(*sample) for sample in chosen]), 0

    return rule


def _register(
    schema: str, function: Any, fake: Any, gradients: Any = _refuse_gradients, save: Any = None
) -> None:
    name = schema.split("(")[0]
    full_name = f"featup_hub::{name}"
    if hasattr(torch.ops.featup_hub, name):
        return
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(full_name, fake, lib=_library)
    torch.library.register_autograd(full_name, gradients, setup_context=save, lib=_library)
    if save is not None and hasattr(torch.library, "register_vmap"):  # since torch 2.5
        torch.library.register_vmap(full_name, _call_each_sample(name), lib=_library)


_register(
    f"jbu_kernel(Tensor guidance, {_WEIGHTS}, str impl) -> Tensor",
    _kernel,
    _fake_kernel,
    _kernel_gradients,
    _save_kernel,
)
_register(
    f"jbu_kernel_backward(Tensor grad, Tensor guidance, {_WEIGHTS}, str impl) -> ({_GRADIENTS})",
    _kernel_backward,
    _fake_kernel_backward,
)
_register(
    "jbu_apply(Tensor source, Tensor kernel, Tensor? bias, str impl) -> Tensor",
    _apply,
    _fake_apply,
    _apply_gradients,
    _save_apply,
)
_register(
    "jbu_apply_backward(Tensor grad, Tensor source, Tensor kernel, bool need_source, "
    "bool need_kernel, str impl) -> (Tensor, Tensor)",
    _apply_backward,
    _fake_apply_backward,
)
_JOINT = "Tensor query, Tensor key, Tensor spatial, Tensor range, SymInt rows, SymInt columns"
_register(
    f"joint_kernel({_JOINT}, int radius, str impl) -> Tensor",
    _joint,
    _fake_joint,
    _joint_gradients,
    _save_joint,
)
_register(
    f"joint_kernel_backward(Tensor grad, {_JOINT}) -> (Tensor, Tensor, Tensor, Tensor)",
    _joint_backward,
    _fake_joint_backward,
)
# For compilers. Without it they compile the pooling matrices of every stage, which takes as long as
# all the rest.
_register(
    "pool_guidance(Tensor image, SymInt height, SymInt width) -> Tensor",
    _pool,
    _fake_pool,
    _pool_gradients,
    _save_pool,
)
