"""Several looks at an image, shifted by fractions of the stride, stitched to one finer source.

Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015, section 3.2 ("shift-and-stitch").
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.backbones.contract import Backbone, check_backbone
from featup_hub.ops.jbu import check_numbers

_INNER, _OUTER = 19 / 32, -3 / 32  # PyTorch's bicubic weights halfway between two pixels


class ShiftAndStitch(Backbone):
    r"""Runs a backbone on shifted images and interleaves the features.

    With k looks per side, look (i, j) sees the image moved by :math:`((i + 1/2)/k - 1/2)\,p`
    rows and as many columns for j, where p is the backbone's stride. Its cells are rows i, i + k,
    ... and columns j, j + k, ... of the source. The cells of the source are evenly spaced over the
    image, the first centre at half of the finer stride p/k. Beyond its borders the image is
    mirrored. No training is needed; the cost is k² passes of the backbone.

    Every second look sees its image mirrored left to right, and its features are mirrored back.
    Neighbouring cells then have different errors, which an upsampler averages. In the source itself
    they can show as a checkerboard.

    Shifts are whole or half pixels (3.5 for a stride of 14 and k = 2); half shifts are bicubic.

    Args:
        backbone: The backbone.
        looks_per_side: k. Its stride must be a multiple of k.
        looks_at_once: Number of looks in one batch. More need more memory; on a GPU they are
            faster.
        mirrored: Which looks see a mirrored image: ``"alternate"``, those with odd i + j; False,
            none; True, each look is averaged with its mirrored one, at twice the cost. Use False
            if left and right differ for the backbone, as in text, or for a source without the
            checkerboard.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from featup_hub.backbones import ModuleBackbone
        >>> cells = ModuleBackbone(nn.AvgPool2d(16), feat_dim=3, patch_size=16)
        >>> stitched, image = ShiftAndStitch(cells, 2), torch.randn(1, 3, 64, 96)
        >>> stitched.patch_size, stitched(image).shape
        (8, torch.Size([1, 3, 8, 12]))
    """

    def __init__(
        self,
        backbone: Backbone,
        looks_per_side: int = 2,
        *,
        looks_at_once: int = 1,
        mirrored: bool | Literal["alternate"] = "alternate",
    ) -> None:
        check_backbone(backbone)
        check_numbers(1, looks_per_side=looks_per_side, looks_at_once=looks_at_once)
        if mirrored not in (False, True, "alternate"):
            raise ValueError(f"mirrored must be False, True or 'alternate'; got {mirrored!r}")
        if backbone.patch_size % looks_per_side:
            raise ValueError(
                f"looks_per_side must divide the stride of {backbone.patch_size} pixels; got "
                f"{looks_per_side}"
            )
        if backbone.fixed_size is not None:
            raise ValueError(
                f"shifted looks need a backbone that takes any size of image; this one sees every "
                f"image at {backbone.fixed_size}; use it without looks"
            )
        super().__init__(
            feat_dim=backbone.feat_dim,
            patch_size=backbone.patch_size // looks_per_side,
            in_chans=backbone.in_chans,
        )
        self.backbone = backbone
        self.looks_per_side = looks_per_side
        self.looks_at_once = looks_at_once
        self.mirrored = mirrored

    def features(self, image: Tensor) -> Tensor:
        """Computes every look and interleaves their features."""
        fine, count = self.patch_size, self.looks_per_side
        height, width = image.shape[-2] // fine, image.shape[-1] // fine
        # A look covers whole strides; cells beyond the image are cropped below.
        size = [(n + count - 1) // count * self.backbone.patch_size for n in (height, width)]
        first = (fine - self.backbone.patch_size) / 2
        shifts = [first + index * fine for index in range(count)]
        looks = [
            _moved(_moved(image, 2, down, size[0]), 3, across, size[1])
            for down in shifts
            for across in shifts
        ]
        alternate = self.mirrored == "alternate"
        turned = [alternate and (n // count + n % count) % 2 == 1 for n in range(len(looks))]
        looks = [look.flip(3) if turn else look for look, turn in zip(looks, turned, strict=True)]
        groups = [
            self._look(torch.cat(looks[first : first + self.looks_at_once]))
            for first in range(0, len(looks), self.looks_at_once)
        ]
        maps = torch.cat(groups).unflatten(0, (len(looks), -1)).unbind()  # k² of (B, C, h, w)
        maps = [each.flip(3) if turn else each for each, turn in zip(maps, turned, strict=True)]
        stitched = F.pixel_shuffle(torch.stack(maps, 2).flatten(1, 2), count)
        return stitched[:, :, :height, :width]

    def _look(self, image: Tensor) -> Tensor:
        features: Tensor = self.backbone(image)
        if self.mirrored in (False, "alternate"):
            return features
        return (features + self.backbone(image.flip(3)).flip(3)) / 2


def root_of_looks(looks: int, stride: int) -> int:
    """Returns the looks per side, which must divide the stride; raises ValueError otherwise."""
    roots = {k * k: k for k in range(1, stride + 1) if stride % k == 0}
    if not isinstance(looks, Integral) or looks not in roots:
        raise ValueError(
            f"looks must be one of {', '.join(map(str, roots))}, the squares of the divisors of "
            f"the stride of {stride} pixels; got {looks!r}"
        )
    return roots[looks]


def _moved(image: Tensor, axis: int, shift: float, length: int) -> Tensor:
    """Returns ``length`` pixels of the image starting at ``shift``, mirrored beyond its edges."""
    last = image.shape[axis] - 1
    first = math.floor(shift)

    def shown(start: int) -> Tensor:
        place = torch.arange(length, device=image.device) + start
        place = torch.where(place < 0, -1 - place, place)
        place = torch.where(place > last, 2 * last + 1 - place, place)
        return image.index_select(axis, place.clamp(min=0))

    if first == shift:
        return shown(first)
    inner, outer = shown(first) + shown(first + 1), shown(first - 1) + shown(first + 2)
    return _INNER * inner + _OUTER * outer
