"""A backbone and an upsampler as one module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from featup_hub.backbones import Backbone, ChannelNorm
from featup_hub.backbones.contract import check_backbone
from featup_hub.ops import Implementation
from featup_hub.upsamplers import FoldedHead, JBUStack
from featup_hub.upsamplers.head import check_head

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


class UpsampledBackbone(nn.Module):
    """Computes features at the image's own resolution.

    Args:
        backbone: The network that turns the image into low-resolution features.
        upsampler: The module that upsamples these to the image's resolution.
        norm: Normalises the source in between, as upstream's ``use_norm`` does.
        image_size: Short side to which :meth:`preprocess` resizes an image by default, in pixels;
            None keeps the image's own size.

    Attributes:
        mean: Normalisation of images, ImageNet's for every model.
        std: Divisor of the same normalisation.
        patch_size: Stride of the source in pixels.
        feat_dim: Channels of the features.

    Example:
        >>> import torch
        >>> from featup_hub import ModuleBackbone
        >>> cnn = ModuleBackbone(nn.Conv2d(3, 8, 16, stride=16), feat_dim=8, patch_size=16)
        >>> model = UpsampledBackbone(cnn, JBUStack()).eval()
        >>> model(torch.randn(1, 3, 64, 75)).shape
        torch.Size([1, 8, 64, 75])
    """

    def __init__(
        self,
        backbone: Backbone,
        upsampler: JBUStack | FoldedHead,
        *,
        norm: ChannelNorm | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        if not isinstance(upsampler, (JBUStack, FoldedHead)):
            raise TypeError(
                f"an upsampler must be a JBUStack, such as featup_hub.load_upsampler(); got "
                f"{type(upsampler).__name__}"
            )
        self.backbone = backbone
        self.norm = norm
        self.upsampler = upsampler
        if self.stack.looks_per_side != backbone.looks_per_side:
            # A copy with shared parts: the user's upsampler stays as it is.
            stack = copy.copy(self.stack)
            stack.looks_per_side = backbone.looks_per_side
            head = upsampler.head if isinstance(upsampler, FoldedHead) else None
            self.upsampler = stack if head is None else FoldedHead(stack, head)
        self.image_size = image_size
        self.mean, self.std = backbone.mean, backbone.std
        self.patch_size, self.feat_dim = backbone.patch_size, backbone.feat_dim
        if self.stack.feat_dim not in (None, backbone.feat_dim):
            raise ValueError(
                f"the upsampler was made for {self.stack.feat_dim} channels; the backbone has "
                f"{backbone.feat_dim}; use one made for it, or JBUStack(feat_dim=None)"
            )

    @property
    def stack(self) -> JBUStack:
        """The upsampler without a head."""
        upsampler = self.upsampler
        return upsampler.upsampler if isinstance(upsampler, FoldedHead) else upsampler

    def preprocess(
        self,
        photo: str | Path | Image.Image | NDArray[Any],
        size: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """Converts a photograph to this model's input, as the command line does.

        Args:
            photo: A file, a PIL image or an array (H, W, 3) of uint8; see
                :func:`featup_hub.read_image`.
            size: Length of the short side, or height and width, multiples of ``patch_size``;
                default: ``image_size``. See :func:`featup_hub.image.resize`.

        Returns:
            The normalised image, (1, 3, H, W), on the model's device and in its precision.

        Example:
            >>> import numpy as np
            >>> from featup_hub import load
            >>> model = load("efficientnet_lite0")
            >>> model.preprocess(np.zeros((60, 90, 3), dtype=np.uint8), size=32).shape
            torch.Size([1, 3, 32, 48])
        """
        from featup_hub.image import preprocess

        size = self.image_size if size is None else size
        image = preprocess(photo, size, mean=self.mean, std=self.std, multiple_of=self.patch_size)
        like = next((p for p in self.parameters() if p.is_floating_point()), image)
        return image.to(like.device, like.dtype)

    def source(self, image: Tensor) -> Tensor:
        """Returns the features before upsampling, (B, C, ceil(H/p), ceil(W/p)) for stride p."""
        source: Tensor = self.backbone(image)
        return source if self.norm is None else self.norm(source)

    def forward(
        self,
        image: Tensor,
        *,
        guidance: Tensor | None = None,
        size: int | tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Returns the features of an image at its own resolution.

        Args:
            image: RGB normalised by ``mean`` and ``std``, any size, (B, 3, H, W); or another input
                of the backbone, such as 13 bands.
            guidance: Normalised RGB that guides the upsampling, (B, 3, H, W); default: the image.
            size: Height and width wanted, or the length of the short side; default: those of the
                guidance.
            impl: Implementation, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, H, W).

        Raises:
            ValueError: If ``image`` is not (B, 3, H, W), ``size`` is below the source's, or a
                guidance is missing.
            TypeError: If ``image`` is not a tensor, or its precision is not the model's.
        """
        return self._upsample(self.upsampler, image, guidance, size, impl)

    @property
    def num_features(self) -> int:
        """Channels of the features, under timm's name."""
        return self.feat_dim

    @property
    def feature_info(self) -> list[dict[str, int | str]]:
        """Channels and stride of the features, in timm's format."""
        return [{"num_chs": self.feat_dim, "reduction": 1, "module": "upsampler"}]

    def forward_features(self, image: Tensor, *, guidance: Tensor | None = None) -> Tensor:
        """Returns the features without a head, as timm's models do, (B, C, H, W)."""
        return self._upsample(self.stack, image, guidance, None, "auto")

    def fold_head(self, head: nn.Module) -> UpsampledBackbone:
        """Adds a linear head to this model, with the exact result, at the cost of only K channels.

        Takes an ``nn.Linear`` or a 1×1 ``nn.Conv2d``, from C features to K outputs. Returns a model
        of (B, K, H, W) that shares its parameters with this one and the head.
        """
        if isinstance(self.upsampler, FoldedHead):
            raise ValueError("this model has a head already; fold one into the model it came from")
        upsampler = self.upsampler.fold_head(head)
        check_head(head, self.feat_dim)
        folded = UpsampledBackbone(
            self.backbone, upsampler, norm=self.norm, image_size=self.image_size
        )
        # Not folded.train(): it would change the mode of shared parts, such as a frozen backbone.
        folded.training = self.training
        head.train(self.training)
        return folded

    def _upsample(
        self,
        upsampler: nn.Module,
        image: Tensor,
        guidance: Tensor | None,
        size: int | tuple[int, int] | None,
        impl: Implementation,
    ) -> Tensor:
        if guidance is None:
            guidance = image
            channels, bands = self.stack.guidance_dim, getattr(self.backbone, "in_chans", 3)
            if bands != channels and isinstance(image, Tensor) and image.dim() == 4:
                raise ValueError(
                    f"upsampling is guided by an image of {channels} channels; the backbone takes "
                    f"{bands}; pass RGB beside the image: model(image, guidance=rgb)"
                )
        return cast(Tensor, upsampler(self.source(image), guidance, size=size, impl=impl))
