"""The common interface of backbones.

A backbone takes a normalised image and returns its source, one vector per patch. Two rules hold for
all backbones, so that a source always covers its image edge to edge:

* the image may have any size. If a side is not a multiple of ``patch_size``, the image is first
  resized up to the next multiple, so the source has ceil(H/p)×ceil(W/p) positions. For a network
  with a fixed size, the image is resized to it, and the source has a fixed size, too;
* the image is normalised with ImageNet's mean and deviation, as upstream does everywhere. For a
  network with another normalisation, the image is converted. The upsampler reads colours and needs
  the same normalisation for every backbone. Images with other bands than RGB are not converted.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops.jbu import check_normalisation, check_numbers
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD


class Backbone(nn.Module):
    """Computes low-resolution features of an image.

    To wrap a network of your own, use :class:`~featup_hub.backbones.ModuleBackbone`, or derive
    from this class and write :meth:`features`.

    Args:
        feat_dim: Channels of the features.
        patch_size: Stride of the features in pixels.
        mean: Normalisation the network was trained with, per channel.
        std: Divisor of the same normalisation.
        in_chans: Bands of the images; 3 are RGB.
        fixed_size: Fixed height and width of the network's images; None if it takes any multiple of
            ``patch_size``.

    Attributes:
        mean: Normalisation of RGB images given to :meth:`forward`, ImageNet's for every backbone.
        std: Divisor of the same normalisation.
        looks_per_side: Looks at an image on each side, see
            :class:`~featup_hub.backbones.ShiftAndStitch`.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    looks_per_side = 1

    def __init__(
        self,
        *,
        feat_dim: int,
        patch_size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        in_chans: int = 3,
        fixed_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_numbers(1, feat_dim=feat_dim, patch_size=patch_size, in_chans=in_chans)
        if in_chans == 3:
            check_normalisation(mean, std)
        if fixed_size is not None and not (
            isinstance(fixed_size, (tuple, list)) and len(fixed_size) == 2
        ):
            raise TypeError(f"fixed_size must be (height, width); got {fixed_size!r}")
        self.feat_dim = feat_dim
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.fixed_size = fixed_size
        self._native = (tuple(mean), tuple(std))

    def forward(self, image: Tensor) -> Tensor:
        """Returns the source of an image.

        Args:
            image: Normalised RGB of any size, (B, 3, H, W), or (B, in_chans, H, W).

        Returns:
            Features, (B, C, ceil(H/p), ceil(W/p)) with p the patch size; a fixed size if
            ``fixed_size`` is set.
        """
        if not isinstance(image, Tensor):
            raise TypeError(
                f"a backbone takes a normalised image as a tensor, (B, {self.in_chans}, H, W); got "
                f"{type(image).__name__}; call model(model.preprocess(photo))"
            )
        if image.dim() != 4 or image.shape[1] != self.in_chans or 0 in image.shape:
            needed = "be RGB" if self.in_chans == 3 else f"have {self.in_chans} bands"
            hint = ""
            if image.dim() == 3:
                hint = "; add a batch dimension: image[None]"
            elif image.dim() == 4 and image.shape[-1] == self.in_chans:
                hint = "; move the channels: image.movedim(-1, 1)"
            elif image.dim() == 4 and image.shape[1] == 1 and self.in_chans == 3:
                hint = "; repeat a grey channel: image.expand(-1, 3, -1, -1)"
            raise ValueError(
                f"an image must {needed}, (B, {self.in_chans}, H, W); got "
                f"{tuple(image.shape)}{hint}"
            )
        if not image.is_floating_point():
            raise TypeError(
                f"an image must be normalised floating-point RGB; got {image.dtype}; "
                "divide by 255, subtract model.mean and divide by model.std"
            )
        old, patch = image.shape[-2:], self.patch_size
        new = self.fixed_size or (-(-old[0] // patch) * patch, -(-old[1] // patch) * patch)
        if new != tuple(old):
            # Only for a network with a fixed size are images reduced.
            smaller = new[0] < old[0] or new[1] < old[1]
            image = F.interpolate(
                image, new, mode="bicubic", align_corners=False, antialias=smaller
            )
        try:
            return self.features(self._to_native(image))
        except RuntimeError as error:
            own = {(p.dtype, p.device) for p in self.parameters() if p.is_floating_point()}
            if len(own) != 1 or (image.dtype, image.device) in own:
                raise
            dtype, device = own.pop()
            raise TypeError(
                f"this backbone needs images as its own weights are, {dtype} on {device}; got "
                f"{image.dtype} on {image.device}; convert one of them with .to(device, dtype)"
            ) from error

    def features(self, image: Tensor) -> Tensor:
        """Computes the features of an image, (B, C, H/p, W/p).

        The image has the network's own normalisation; its sides are multiples of ``patch_size``, or
        ``fixed_size``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define features(image)")

    def _to_native(self, image: Tensor) -> Tensor:
        """Converts ImageNet's normalisation to the network's own."""
        if self.in_chans != 3 or self._native == (self.mean, self.std):
            return image
        (mean, std), filled = self._native, partial(image.new_full, (1, 1))
        # Filled on the device: a captured graph must not copy.
        scale = [filled(s / n) for s, n in zip(self.std, std, strict=True)]
        shift = [filled((m - n) / d) for m, n, d in zip(self.mean, mean, std, strict=True)]
        return image * torch.stack(scale) + torch.stack(shift)


def check_backbone(backbone: object) -> None:
    """Raises TypeError unless the argument is a backbone."""
    if not isinstance(backbone, Backbone):
        raise TypeError(
            f"a backbone must be a featup_hub.Backbone; got {type(backbone).__name__}; take "
            "model.backbone of a loaded model, or wrap a module: "
            "ModuleBackbone(module, feat_dim=..., patch_size=...)"
        )


class ChannelNorm(nn.LayerNorm):
    """Normalises every position's vector, (B, C, h, w): a LayerNorm over the channels."""

    def __init__(self, feat_dim: int) -> None:
        super().__init__(feat_dim, eps=1e-5)

    def forward(self, source: Tensor) -> Tensor:
        """Returns features of zero mean and unit variance over C, then scaled and shifted."""
        return super().forward(source.movedim(1, -1)).movedim(-1, 1)
