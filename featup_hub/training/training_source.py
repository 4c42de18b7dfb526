"""A training source: a frozen backbone and the learned model of its features."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.backbones.contract import check_backbone
from featup_hub.image import normalise_values
from featup_hub.loading import find_backbone, load_backbone
from featup_hub.training.downsamplers import AttentionDownsampler, SimpleDownsampler
from featup_hub.training.losses import ScaleNet


class TrainingSource(nn.Module):
    """A frozen backbone with the learned model of its features: downsampler, scale, standardiser.

    The ``state_dict`` contains the learned and measured tensors, not the backbone.
    """

    def __init__(
        self, backbone: Backbone, *, downsampler: Literal["attention", "simple"] = "attention"
    ) -> None:
        super().__init__()
        if backbone.fixed_size is not None:
            raise ValueError(
                "training shows a backbone images of several sizes; this one sees every image at "
                f"{backbone.fixed_size}; use one that takes any size"
            )
        backbone = backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._backbone = (backbone,)  # a tuple hides it from the state_dict
        self.patch_size = backbone.patch_size
        self.feat_dim = backbone.feat_dim
        self.standardise = Standardiser(self.feat_dim)
        kind = SimpleDownsampler if downsampler == "simple" else AttentionDownsampler
        self.downsampler = kind(self.feat_dim, self.patch_size)
        self.scale = ScaleNet(self.feat_dim)

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._backbone[0]

    def normalise(self, rgb: Tensor) -> Tensor:
        """Normalises RGB in [0, 1] for the backbone; the result is also the guidance."""
        return normalise_values(rgb, self.backbone.mean, self.backbone.std)

    def measure(self, photos: Iterable[Tensor]) -> None:
        """Measures the scale of the features on photographs, each (1, 3, H, W) in [0, 1]."""
        self.standardise.fit(torch.cat([self._raw(self.normalise(rgb)) for rgb in photos]))

    def observe(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Resizes images and returns their standardised features, (B, C, h, w)."""
        if tuple(images.shape[-2:]) != tuple(size):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.standardise(self._raw(images))

    @torch.no_grad()
    def _raw(self, images: Tensor) -> Tensor:
        # Convolutions on a CPU are faster in this layout; a ViT runs equally fast.
        features: Tensor = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return features.float()

    def project(self, features: Tensor, projection: Tensor) -> Tensor:
        """Projects standardised features, and appends their saliency, if the downsampler has one.

        The saliency is linear in the features, so it can be upsampled as one more channel.
        Features are (B, C, h, w), the projection's directions (K, C). The source is
        (B, K + 1, h, w), or (B, K, h, w) for the simple downsampler.
        """
        projection = torch.cat([projection, self.downsampler.saliency])
        return torch.einsum("kc,bchw->bkhw", projection, features)


class Standardiser(nn.Module):
    """Scales every channel of a backbone's features to mean 0 and deviation 1.

    Scales differ by orders of magnitude between backbones, and between the channels of a ViT.
    Standardised channels have equal weight in a loss. JBU filters all channels with the same
    kernels, so it commutes with the scaling (and with the shift if kernels sum to one).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, feat_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feat_dim))
        self.register_buffer("deviation", torch.ones(feat_dim))

    def fit(self, features: Tensor) -> None:
        """Measures mean and deviation on features, (B, C, h, w)."""
        values = features.transpose(0, 1).flatten(1).cpu().double()  # not every device has float64
        deviation, mean = torch.std_mean(values, dim=1)
        # An almost constant channel is noise; dividing it by its deviation would amplify it.
        self.deviation.copy_(deviation.clamp(min=1e-2 * float(deviation.mean()) + 1e-12))
        self.mean.copy_(mean)

    def forward(self, features: Tensor) -> Tensor:
        """Standardises features, (B, C, h, w)."""
        return (features - self.mean[:, None, None]) / self.deviation[:, None, None]


def random_projection(channels: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draws ``dim`` random orthonormal directions, (dim, channels).

    The mean variance of standardised features stays one. Distances scale by √(dim/channels).
    """
    if dim > channels:
        raise ValueError(
            f"a projection cannot have more directions than channels, {channels}; got {dim}; "
            "lower projection_dim"
        )
    basis: Tensor = torch.linalg.qr(torch.randn(channels, dim, generator=generator))[0]
    return basis.t().contiguous()


def open_backbones(
    names: Sequence[str], given: Mapping[str, Backbone] | None = None
) -> dict[str, Backbone]:
    """Loads backbones, each ``NAME`` or ``NAME=FILE``, or copies them from ``given``."""
    if not names:
        raise ValueError("training needs the features of at least one backbone; name one")
    if given is None:
        # All names and files before the first download.
        found = {name: find_backbone(name) for name in names}
        return {name: load_backbone(card, weights=file) for name, (card, file) in found.items()}
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"a backbone is needed for every name; there is none for {', '.join(missing)}; "
            "add it, or leave the name out"
        )
    for name in names:
        check_backbone(given[name])
    # Copies: training freezes them; the caller's stay on their device and in their mode.
    return {name: copy.deepcopy(given[name]) for name in names}
