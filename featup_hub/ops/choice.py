"""Chooses the implementation, and reports the choice and its reason."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


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
    from featup_hub.ops.cuda.backend import usual_programs
    from featup_hub.ops.cuda.programs import UnavailableError, prepare

    name = str(device)
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    try:
        programs = [prepare(program, device) for program in usual_programs()]
    except UnavailableError as error:
        return ImplementationStatus(device=name, impl="torch", reason=str(error))
    return ImplementationStatus(
        device=name,
        impl="cuda",
        compiler=programs[0].compiler,
        cubins=tuple(p.path for p in programs if p.path is not None),
    )


def run(impl: str, name: str, *args: Any) -> Any:
    """Calls a function of the implementation that ``impl`` names, and imports it at its first use.

    ``"auto"`` takes the fused kernels on a CUDA device, the device of the first argument. If they
    cannot compute with these arguments, it takes ``torch_backend`` and warns once per reason.

    Raises:
        RuntimeError: If ``impl`` is ``"cuda"`` and the fused kernels cannot run; with the reason.
    """
    if impl == "cuda" or (impl == "auto" and args[0].device.type == "cuda"):
        from featup_hub.ops.cuda import backend
        from featup_hub.ops.cuda.programs import UnavailableError

        try:
            return getattr(backend, name)(*args)
        except UnavailableError as error:
            if impl == "cuda":
                raise RuntimeError(f"impl='cuda' was asked for and cannot run: {error}") from error
            _warn_once(str(error))
    from featup_hub.ops import torch_backend

    return getattr(torch_backend, name)(*args)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"impl='auto' computes in plain PyTorch, without the fused CUDA kernels: {reason}",
        stacklevel=2,
    )
