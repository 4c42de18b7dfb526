"""Any network of timm with ``forward_intermediates``: ViTs, CNNs and hybrids.

timm finds, downloads and converts its own weights. ``docs/families.md`` lists the families of
networks.

Source: the timm library (Apache-2.0), 1.0.9 or newer; DINOv3 and SigLIP 2 need newer ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from featup_hub.backbones.contract import Backbone
from featup_hub.backbones.timm_network import choose_layer, create, find_geometry

__all__ = ["TimmBackbone"]


class TimmBackbone(Backbone):
    """A network of timm as a backbone.

    Class and register tokens are left out. Position embeddings are resampled to the image's size,
    square or not. By default the features are the deepest, normalised by the network's own closing
    norm if it has a suitable one. Later layers are removed.

    Args:
        name: A timm name, with or without a tag of weights, or ``hf-hub:owner/name``.
        pretrained: Whether timm loads the weights of that name; otherwise they are random.
        weights: Weights of your own instead: a file, or tensors by name. Names and shapes may be
            timm's or the authors', with any number of classes, or none.
        layer: Index into the network's intermediate features: blocks of a ViT, stages of a CNN.
        stride: Takes the deepest features with this stride instead, in pixels.
        norm: Whether the closing norm is applied.
        backbone_kwargs: Arguments for ``timm.create_model``, such as ``{"img_size": 448}`` or
            ``{"in_chans": 13}``.

    Example:
        >>> import torch
        >>> backbone = TimmBackbone("tf_efficientnet_lite0", stride=16).eval()
        >>> backbone(torch.randn(1, 3, 64, 90)).shape
        torch.Size([1, 112, 4, 6])
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: Mapping[str, Tensor] | str | Path | None = None,
        layer: int | None = None,
        stride: int | None = None,
        norm: bool = True,
        backbone_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        kwargs = dict(backbone_kwargs or {})
        model = create(name, pretrained=pretrained, weights=weights, backbone_kwargs=kwargs)
        index, feat_dim, patch_size = choose_layer(name, model, layer, stride)
        # Some networks without a closing norm refuse the argument.
        norm = norm and any("norm" in child for child, _ in model.named_children())
        self._options = {"norm": norm, "stop_early": True, "intermediates_only": True}
        in_chans = int(kwargs.get("in_chans") or model.pretrained_cfg["input_size"][0])
        geometry = find_geometry(name, model, kwargs, patch_size, in_chans, [index], self._options)
        super().__init__(
            feat_dim=geometry.feat_dim or feat_dim,
            patch_size=patch_size,
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
            in_chans=in_chans,
            fixed_size=geometry.fixed_size,
        )
        model.prune_intermediate_layers([index], prune_norm=not norm)
        self.name = name
        self.model = model
        self.layer = index
        self._padding = geometry.padding

    def features(self, image: Tensor) -> Tensor:
        """Computes the chosen intermediate features."""
        if self._padding:
            before, after = self._padding // 2, self._padding - self._padding // 2
            image = F.pad(image, (before, after, before, after), mode="replicate")
        (features,) = self.model.forward_intermediates(image, indices=[self.layer], **self._options)
        if features.shape[1] != self.feat_dim:  # old versions of timm count some layers differently
            raise RuntimeError(
                f"timm announces {self.feat_dim} channels in layer {self.layer} of {self.name}; "
                f"got {features.shape[1]}; upgrade it: pip install --upgrade timm"
            )
        return features
