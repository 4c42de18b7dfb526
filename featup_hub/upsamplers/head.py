"""A linear head joined behind an upsampler, and applied in front of it, where it is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops import Implementation
from featup_hub.upsamplers.stage import pass_stages

if TYPE_CHECKING:  # the stack makes folded heads, so it imports this module
    from featup_hub.upsamplers.jbu import JBUStack

__all__ = ["FoldedHead"]


class FoldedHead(nn.Module):
    """An upsampler and a linear head as one, see :meth:`JBUStack.fold_head`.

    Args:
        upsampler: The upsampler.
        head: A 1×1 convolution from C features to K outputs.

    Raises:
        ValueError: If it is none, or has groups, a stride or a padding.
    """

    def __init__(self, upsampler: JBUStack, head: nn.Conv2d) -> None:
        super().__init__()
        if not (
            isinstance(head, nn.Conv2d)
            and (head.kernel_size, head.groups, head.stride) == ((1, 1), 1, (1, 1))
            and head.padding in ((0, 0), "valid", "same")
        ):
            raise ValueError(
                "only a 1×1 convolution, an nn.Conv2d without groups, stride or padding, commutes "
                f"with the upsampler; got {head}"
            )
        self.upsampler = upsampler
        self.head = head

    def forward(
        self,
        source: Tensor,
        guidance: Tensor,
        *,
        size: tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Returns the head's outputs at the size wanted, (B, K, H, W)."""
        stack = self.upsampler
        stack._check(source, guidance)
        first, plan = stack._plan((source.shape[2], source.shape[3]), guidance, size, impl)
        source, bias = stack._before(source)
        source = F.conv2d(source, self.head.weight)
        source = stack._pass_first(source, first, impl)
        del first
        if bias is not None:
            bias = self.head.weight.flatten(1) @ bias
        if self.head.bias is not None:
            bias = self.head.bias if bias is None else bias + self.head.bias
        return pass_stages(source, (s.kernel(g, impl=impl) for s, g in plan), len(plan), bias, impl)
