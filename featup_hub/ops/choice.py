"""Chooses the implementation, and reports the choice and its reason."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from featup_hub.ops import torch_backend
from featup_hub.ops.cuda import backend as cuda
from featup_hub.ops.cuda.programs import UnavailableError, prepare

__all__ = ["ImplementationStatus", "choose", "implementations"]


@dataclass(frozen=True, kw_only=True)
class ImplementationStatus:
    """The implementation on one device with ``impl="auto"``.

    Attributes:
        device: The device, with its name.
        impl: ``"cuda"`` or ``"torch"``.
        reason: Why ``"cuda"`` cannot run; None if it can.
        compiler: Compiler of the kernels; None if they do not run.
        cubins: Files of the compiled kernels; empty if they do not run or are only in memory.
    """

    device: str
    impl: str
    reason: str | None = None
    compiler: str | None = None
    cubins: tuple[Path, ...] = ()

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.device}: {self.impl}, because {self.reason}"
        place = f"in {self.cubins[0].parent}" if self.cubins else "in memory only"
        return f"{self.device}: {self.impl}, compiled by {self.compiler}, kept {place}"


def implementations() -> list[ImplementationStatus]:
    """Reports what ``impl="auto"`` runs on the CPU and every CUDA device, and why.

    Prepares the fused kernels where they can run; the first time, this compiles them.

    Example:
        >>> print(implementations()[0])
        cpu: torch, because the fused kernels need tensors on a CUDA device; got cpu; ...
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [_status(device) for device in devices]


def _status(device: torch.device) -> ImplementationStatus:
    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    try:
        programs = [prepare(program, device) for program in cuda.usual_programs()]
    except UnavailableError as error:
        return ImplementationStatus(device=name, impl="torch", reason=str(error))
    return ImplementationStatus(
        device=name,
        impl="cuda",
        compiler=programs[0].compiler,
        cubins=tuple(p.path for p in programs if p.path is not None),
    )


def choose(impl: str, obstacle: Callable[..., str | None], *tensors: Any) -> ModuleType:
    """Returns the module of the implementation, with the functions of ``torch_backend``.

    ``obstacle`` returns why the fused kernels cannot compute with these tensors, of which the first
    gives the device. Then ``"auto"`` takes ``torch_backend``; on a CUDA device it warns once per
    reason.

    Raises:
        RuntimeError: If ``impl`` is ``"cuda"`` and the fused kernels cannot run; with the reason.
    """
    if impl == "torch" or (impl == "auto" and tensors[0].device.type != "cuda"):
        return torch_backend
    reason = obstacle(*tensors)
    if reason is None:
        return cuda
    if impl == "cuda":
        raise RuntimeError(f"impl='cuda' was asked for and cannot run: {reason}")
    _warn_once(reason)
    return torch_backend


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"impl='auto' computes in plain PyTorch, without the fused CUDA kernels: {reason}",
        stacklevel=2,
    )
