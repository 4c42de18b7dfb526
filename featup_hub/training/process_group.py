"""The process group of a training run: several processes, started by ``torchrun``, or one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class ProcessGroup(NamedTuple):
    """The processes that train together: this one's number, from 0, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sums floating-point tensors over all processes, in place; all get the same bits."""
        if self.size > 1:
            flat = parameters_to_vector(tensors)
            dist.all_reduce(flat)
            vector_to_parameters(flat, tensors)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """Yields the process group, and joins it if ``torchrun`` started this process.

    The device "cuda" means the process's own GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    joins = size > 1 and not dist.is_initialized()
    if joins:
        on_cuda = torch.device(device).type == "cuda"
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        joined = dist.is_available() and dist.is_initialized()
        yield ProcessGroup(dist.get_rank(), dist.get_world_size()) if joined else ProcessGroup()
    finally:
        if joins:
            dist.destroy_process_group()
