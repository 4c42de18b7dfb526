"""A linear head after a stack, applied at low resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops import Implementation

if TYPE_CHECKING:
    from featup_hub.upsamplers.jbu import JBUStack


class FoldedHead(nn.Module):
    """An upsampler with a linear head, see :meth:`JBUStack.fold_head`.

    The head is an ``nn.Linear``, or a 1×1 ``nn.Conv2d`` without groups, stride or padding.

    Raises:
        ValueError: If the head is of another kind, or for another number of channels, or does
            more than its weight and bias say.
    """

    def __init__(self, upsampler: JBUStack, head: nn.Module) -> None:
        super().__init__()
        check_head(head, upsampler.feat_dim)
        self.upsampler = upsampler
        self.head = head
        self.training = upsampler.training

    def forward(
        self,
        source: Tensor,
        guidance: Tensor,
        *,
        size: int | tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Returns the head's outputs at the size wanted, (B, K, H, W)."""
        return cast(Tensor, self.upsampler(source, guidance, size=size, impl=impl, head=self.head))


def check_head(head: nn.Module, channels: int | None) -> None:
    """Raises ValueError unless a head is linear and takes so many channels; None: any number."""
    if not isinstance(head, nn.Linear) and not (
        isinstance(head, nn.Conv2d)
        and (head.kernel_size, head.groups, head.stride) == ((1, 1), 1, (1, 1))
        and head.padding in ((0, 0), "valid", "same")
    ):
        raise ValueError(
            "only a linear head commutes with the upsampler: an nn.Linear, or a 1×1 nn.Conv2d "
            f"without groups, stride or padding; got {head}; put it behind the upsampler"
        )
    layer = nn.Linear if isinstance(head, nn.Linear) else nn.Conv2d
    hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
    if hooks or type(head).forward is not layer.forward:
        raise ValueError(
            "only a linear head commutes with the upsampler; this one has hooks or a forward of "
            f"its own, which are not called: {head}; normalise or prune its weight by "
            "torch.nn.utils.parametrizations, or fold a plain layer with its weight and bias"
        )
    taken = head.weight.shape[1]
    if channels not in (None, taken):
        raise ValueError(
            f"a head for features of {channels} channels is needed; got one that takes {taken}; "
            f"make it with {channels} inputs"
        )


def apply_head(
    head: nn.Module, source: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Applies a head to features, (B, C, h, w), to which a bias, (C,), is to be added later.

    Returns the head's outputs, (B, K, h, w), and the bias, (K,), to add to them.
    """
    weight = cast(Tensor, head.weight).flatten(1)  # (K, C)
    offset = cast("Tensor | None", head.bias)
    source = F.conv2d(source, weight[:, :, None, None])
    bias = bias if bias is None else weight @ bias
    return source, bias if offset is None else offset if bias is None else bias + offset
