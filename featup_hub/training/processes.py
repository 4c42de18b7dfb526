"""Several processes as one trainer, as ``torchrun`` starts them: replicas, summed gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Team", "joined"]


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes that train together, and which one this is.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Adds up every tensor over all processes, in place; all then hold the same bits.

        Args:
            tensors: Floating-point tensors on one device, of the same shapes in all processes.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, parts, strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Waits until all processes have come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """Joins the processes that ``torchrun`` started, or that were joined already; else is alone.

    Args:
        device: Where this process computes. "cuda" is, in each process, the device of its own.

    Yields:
        The team.
    """
    if dist.is_available() and dist.is_initialized():
        yield Team(rank=dist.get_rank(), count=dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_cuda = torch.device(device).type == "cuda"
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_cuda else "gloo")
        try:
            yield Team(rank=dist.get_rank(), count=dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Team()
