"""Principal components, exactly: the few directions in which features vary most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PCA", "fit_pca"]


class PCA(NamedTuple):
    """An affine map to a few coordinates and back.

    Attributes:
        mean: Mean of the features, (C,).
        components: Orthonormal directions by falling variance, (K, C).
        scale: Deviation of a coordinate, (): what makes their mean variance one.
        explained: Share of the variance that the directions hold.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor
    explained: float

    def project(self, features: Tensor) -> Tensor:
        """Returns coordinates, (B, K, h, w), of features, (B, C, h, w)."""
        centred = features - self.mean[:, None, None]
        return torch.einsum("kc,bchw->bkhw", self.components / self.scale, centred)

    @property
    def directions(self) -> Tensor:
        """What turns coordinates back: features = mean + directions · coordinates, (C, K)."""
        return (self.components * self.scale).t().contiguous()


def fit_pca(features: Tensor, components: int) -> PCA:
    """Finds the components of all positions of maps.

    By the eigenvectors of the covariance in double precision, so to more digits than the
    features have, in C²·B·h·w + C³ operations on the features' device.

    Args:
        features: Features, (B, C, h, w).
        components: Number K of directions; at most C are returned.

    Returns:
        The map to coordinates whose mean variance is one.

    Raises:
        ValueError: If the features do not vary, or are not finite.
    """
    # Apple's devices have no double precision.
    exact = features.device if features.device.type != "mps" else torch.device("cpu")
    vectors = features.transpose(0, 1).flatten(1).to(exact, torch.float64)  # (C, N)
    mean = vectors.mean(1)
    centred = vectors - mean[:, None]
    covariance = centred @ centred.t() / centred.shape[1]
    total = float(covariance.trace())
    if not 0 < total < float("inf"):
        raise ValueError(
            f"principal components need features that are finite and vary; their variance is "
            f"{total}; check backbone and image"
        )
    values, columns = torch.linalg.eigh(covariance)
    values, columns = values.flip(0)[:components].clamp(min=0), columns.flip(1)[:, :components]
    # A direction's sign is arbitrary; its largest entry is made positive.
    sign = columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()
    return PCA(
        mean.to(features),
        (columns * sign).t().contiguous().to(features),
        values.mean().sqrt().to(features),
        float(values.sum()) / total,
    )
