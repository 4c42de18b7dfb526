"""A frozen backbone and what is learnt beside it to explain its features: a training source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.model import load_backbone
from featup_hub.training.downsamplers import AttentionDownsampler, SimpleDownsampler
from featup_hub.training.losses import ScaleNet
from featup_hub.training.projection import Standardiser

__all__ = ["TrainingSource", "open_backbones"]


class TrainingSource(nn.Module):
    """One backbone with its own downsampler, scale and standardisation.

    Only what is learnt or measured is in the ``state_dict``; the backbone is not.

    Args:
        backbone: What to explain.
        downsampler: How features are modelled to have come about.
        window: Side of the downsampler's window, in cells.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        downsampler: Literal["attention", "simple"] = "attention",
        window: float = 1.0,
    ) -> None:
        super().__init__()
        backbone = backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._backbone = (backbone,)  # a tuple hides it from the state_dict
        self.patch_size = backbone.patch_size
        self.feat_dim = backbone.feat_dim
        self.standardise = Standardiser(self.feat_dim)
        kernel = round(window * self.patch_size)
        self.downsampler = (
            SimpleDownsampler(self.patch_size, kernel)
            if downsampler == "simple"
            else AttentionDownsampler(self.feat_dim, self.patch_size, kernel)
        )
        self.scale = ScaleNet(self.feat_dim)

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._backbone[0]

    def normalise(self, rgb: Tensor) -> Tensor:
        """Returns what the backbone takes of RGB in [0, 1]; it is the guidance, too."""
        mean, std = (
            torch.tensor(values, dtype=rgb.dtype, device=rgb.device)[:, None, None]
            for values in (self.backbone.mean, self.backbone.std)
        )
        return (rgb - mean) / std

    def measure(self, photos: Iterable[Tensor]) -> None:
        """Measures the scale of the features on photographs, each (1, 3, H, W) in [0, 1]."""
        looks = (self.normalise(rgb) for rgb in photos)
        self.standardise.fit(
            torch.cat([self.raw(image, (image.shape[-2], image.shape[-1])) for image in looks])
        )

    @torch.no_grad()
    def observe(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns standardised features, (B, C, h, w), of images looked at in another size."""
        return self.standardise(self.raw(images, size))

    @torch.no_grad()
    def raw(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the backbone's features, (B, C, h, w), of images looked at in another size."""
        if tuple(images.shape[-2:]) != tuple(size):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        # Convolutions on a CPU are faster in this layout; a ViT does not mind.
        features: Tensor = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return features.float()

    def project(self, features: Tensor, projection: Tensor) -> Tensor:
        """Projects standardised features, and appends their saliency where it is needed.

        The saliency is linear in the features, so it passes an upsampler as one more channel.

        Args:
            features: Standardised features, (B, C, h, w).
            projection: Directions, (K, C).

        Returns:
            What to upsample, (B, K, h, w) or (B, K + 1, h, w).
        """
        if isinstance(self.downsampler, AttentionDownsampler):
            projection = torch.cat([projection, self.downsampler.saliency])
        return torch.einsum("kc,bchw->bkhw", projection, features)

    def downsample(
        self, features: Tensor, saliency: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        """Returns what the backbone is expected to see of features, (B, K, h, w)."""
        if isinstance(self.downsampler, AttentionDownsampler):
            assert saliency is not None
            return self.downsampler(features, size, saliency=saliency + self.downsampler.offset)
        return self.downsampler(features, size)


def open_backbones(
    names: Sequence[str], given: Mapping[str, Backbone] | None = None
) -> dict[str, Backbone]:
    """Loads backbones.

    Args:
        names: Models' names, or ``TIMM_NAME=FILE`` for a timm model with weights from a file.
        given: Backbones to take in place of loading them.

    Returns:
        Backbones by name.

    Raises:
        ValueError: If a name is not known, or not among those given.
    """
    if not names:
        raise ValueError("training needs the features of at least one backbone; name one")
    if given is None:
        return {name: _open_backbone(name) for name in names}
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"a backbone is needed for every name; there is none for {', '.join(missing)}; "
            "add it, or leave the name out"
        )
    return {name: given[name] for name in names}


def _open_backbone(name: str) -> Backbone:
    name, _, file = name.partition("=")
    return load_backbone(name, weights=file or None)
