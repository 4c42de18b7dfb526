"""The device that ``--device`` names, tried before any work."""

from __future__ import annotations

import torch

from featup_hub.cli.terminal import UsageError

__all__ = ["open_device"]


def open_device(name: str | None) -> torch.device:
    """Returns a device that was tried.

    Args:
        name: Its name as PyTorch has it; default: cuda where there is one, else cpu.

    Raises:
        UsageError: If there is no such device, or it cannot be used here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu, cuda, cuda:1 or mps; got {name!r}") from error
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest is a list of backends
        raise UsageError(f"--device {device} cannot be used here: {reason}") from error
