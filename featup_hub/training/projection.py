"""Two projections: of features to a few random channels, of a stack to kernels that sum to one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featup_hub.upsamplers import JBUStack

__all__ = ["Standardiser", "make_unit_sum", "random_projection"]


class Standardiser(nn.Module):
    """Brings every channel of a backbone's features to mean 0 and deviation 1.

    Backbones differ in scale by orders of magnitude, and so do channels within a ViT; after this
    all weigh alike in a loss. JBU filters channels alike, so it commutes with the scaling (and
    with the shift where kernels sum to one).

    Args:
        feat_dim: Channels.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, feat_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feat_dim))
        self.register_buffer("deviation", torch.ones(feat_dim))

    def fit(self, features: Tensor) -> None:
        """Measures mean and deviation on features, (B, C, h, w)."""
        deviation, mean = torch.std_mean(features.transpose(0, 1).flatten(1).double(), dim=1)
        # A channel that hardly ever moves is noise; dividing by its deviation would amplify it.
        self.deviation.copy_(deviation.clamp(min=1e-2 * float(deviation.mean()) + 1e-12))
        self.mean.copy_(mean)

    def forward(self, features: Tensor) -> Tensor:
        """Standardises features, (B, C, h, w)."""
        return (features - self.mean[:, None, None]) / self.deviation[:, None, None]


def random_projection(channels: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draws ``dim`` orthonormal directions at random, uniformly.

    Standardised features keep a mean variance of one, and distances scale by √(dim/channels).

    Args:
        channels: Channels of the features.
        dim: Channels wanted, at most ``channels``.
        generator: Source of randomness, on the CPU.

    Returns:
        The projection as a matrix, (dim, channels), rows orthonormal.

    Raises:
        ValueError: If ``dim`` exceeds ``channels``.
    """
    if dim > channels:
        raise ValueError(
            f"a projection cannot have more directions than channels, {channels}; got {dim}; "
            "lower projection_dim"
        )
    basis: Tensor = torch.linalg.qr(torch.randn(channels, dim, generator=generator))[0]
    return basis.t().contiguous()


@torch.no_grad()
def make_unit_sum(stack: JBUStack) -> None:
    """Moves a stack to the nearest one whose kernels all sum to exactly one, in place.

    A kernel is a softmax plus 0.1·(W h + b). It sums to one for every h where the columns of W and
    b have zero mean over the taps: their projection on that subspace. Upsampled features then
    keep the source's scale, and a head trained on the source stays valid.

    Args:
        stack: The stack.
    """
    for stage in stack.stages(stack.num_stages):
        weights = stage.weights()
        weights.fixup_w1.sub_(weights.fixup_w1.mean(0))
        weights.fixup_b1.sub_(weights.fixup_b1.mean())
