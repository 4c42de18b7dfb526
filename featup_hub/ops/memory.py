"""Memory for large maps on a CPU, and the size of temporaries."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
CPU_ELEMENTS = 1 << 19  # the measured optimum of cache misses and call overhead
GPU_ELEMENTS = 1 << 26  # a GPU needs few large operations


def new_map(like: Tensor, *shape: int) -> Tensor:
    """Does what ``like.new_empty(shape)`` does, and asks Linux for huge pages.

    Linux provides memory page by page when it is first written. At 4 KB a page this took more than
    a quarter of a forward pass. Where huge pages are disabled, the request has no effect.
    """
    new = like.new_empty(shape)
    if sys.platform == "linux" and new.device.type == "cpu" and new.nbytes >= HUGE_PAGE:
        start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = new.data_ptr() + new.nbytes - start
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return new


def temporary_elements(device: torch.device) -> int:
    """Returns the number of elements that one temporary of an operation should have."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS
