"""The process group of a training run: several processes, started by ``torchrun``, or one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ProcessGroup", "process_group"]


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes that train together.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over all processes, in place. All processes get the same bits.

        Args:
            tensors: Floating-point tensors on one device, of the same shapes in all processes.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, parts, strict=True):
            tensor.copy_(total.view_as(tensor))

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """Yields the process group, and initialises it if ``torchrun`` started this process.

    Args:
        device: Device of this process. "cuda" means the process's own GPU.

    Yields:
        The group; a group of one without ``torchrun``.
    """
    if dist.is_available() and dist.is_initialized():
        yield ProcessGroup(rank=dist.get_rank(), size=dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_cuda = torch.device(device).type == "cuda"
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_cuda else "gloo")
        try:
            yield ProcessGroup(rank=dist.get_rank(), size=dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield ProcessGroup()
