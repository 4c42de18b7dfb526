"""Records the operations that run; lists those that are not deterministic on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Counts all operations by name; notes types and most bytes of tensors besides ``out``."""

    def __init__(self, out: Tensor | None = None) -> None:
        super().__init__()
        self.out = None if out is None else out.untyped_storage().data_ptr()
        self.names: Counter[str] = Counter()
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.out:
                self.dtypes.add(tensor.dtype)
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


# What use_deterministic_algorithms lists as raising an error on a GPU, as far as it could come up.
REFUSED = {
    "adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "bincount",
    "cumsum",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "median",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "put_",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "scatter_reduce",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
}
