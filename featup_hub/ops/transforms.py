"""What function transforms do with the registered operations: ``vmap``, second derivatives.

``torch.func.grad`` and its kin do not pass through operations registered with torch; use
``impl="reference"`` there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["refuse_derivatives", "register_vmap"]


def register_vmap(name: str, library: torch.library.Library) -> None:
    """Lets ``torch.vmap`` pass through an operation that returns one tensor.

    It is called once per sample: it takes batches already, so what is left to map over is what
    may differ between its calls, such as the weights.

    Args:
        name: The operation, ``"namespace::name"``.
        library: Where it is registered.
    """
    namespace, operation = name.split("::")

    def each_sample(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        call = getattr(getattr(torch.ops, namespace), operation)
        results = [
            call(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        return torch.stack(results), 0

    if hasattr(torch.library, "register_vmap"):  # since torch 2.5
        torch.library.register_vmap(name, each_sample, lib=library)


def refuse_derivatives(name: str, library: torch.library.Library) -> None:
    """Makes a derivative of a backward pass an error; torch would take it for zero.

    Args:
        name: The operation, ``"namespace::name"``.
        library: Where it is registered.
    """
    torch.library.register_autograd(name, _refuse, lib=library)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "second derivatives were asked for, and only the definition has them; use impl='reference'"
    )
