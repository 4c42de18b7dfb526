"""Dense CLIP features in the space of its text embeddings.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
2021; the value path follows Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022
(MaskCLIP).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.backbones.contract import Backbone
from featup_hub.backbones.timm_network import create


class ClipBackbone(Backbone):
    """CLIP's patch tokens, each projected as CLIP projects its class token.

    ``name`` is a CLIP image tower of timm's. OpenAI's weights belong to the names with
    ``quickgelu``, the activation of their training. The other arguments mean the same as in
    :class:`~featup_hub.TimmBackbone`.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: Mapping[str, Tensor] | str | Path | None = None,
        backbone_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        model = create(
            name, pretrained=pretrained, weights=weights, backbone_kwargs=backbone_kwargs
        )
        attention = getattr(getattr(model, "blocks", [None])[-1], "attn", None)
        values = getattr(attention, "qkv", None) is not None or hasattr(attention, "v_proj")
        pooled = getattr(model, "attn_pool", None) is not None  # its tokens are not projected
        if not isinstance(getattr(model, "head", None), nn.Linear) or pooled or not values:
            raise ValueError(
                f"a CLIP image tower must have transformer blocks and a projection; timm's {name} "
                "lacks one; use TimmBackbone"
            )
        super().__init__(
            feat_dim=model.head.out_features,
            patch_size=model.feature_info[-1]["reduction"],
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
        )
        self.model = model

    def features(self, image: Tensor) -> Tensor:
        """Computes the projected patch tokens of the last block."""
        (tokens,) = self.model.forward_intermediates(image, indices=[-1], intermediates_only=True)
        return self._project(tokens.movedim(1, -1))

    def _project(self, tokens: Tensor) -> Tensor:
        """Norm and projection into the space of the text embeddings, (B, h, w, D) -> NCHW."""
        closing = getattr(self.model, "fc_norm", None) or nn.Identity()
        return self.model.head(closing(self.model.norm(tokens))).movedim(-1, 1)


class MaskClipBackbone(ClipBackbone):
    """CLIP's patch tokens through only the values of the last block; arguments as for CLIP.

    The last attention mixes patches for the class token. This class leaves out its queries and
    keys, the block's second half and the residual, so every token still describes its own patch.
    """

    def features(self, image: Tensor) -> Tensor:
        """Computes the projected values of the last block."""
        (tokens,) = self.model.forward_intermediates(
            image, indices=[-2], stop_early=True, intermediates_only=True
        )
        block = self.model.blocks[-1]
        attention, tokens = block.attn, block.norm1(tokens.movedim(1, -1))
        if attention.qkv is None:  # EVA may have separate layers for the three
            values = attention.v_proj(tokens)
        else:  # the rows of the values are the last third; EVA has a separate bias for them
            joint, bias = attention.qkv, getattr(attention, "v_bias", None)
            bias = bias if joint.bias is None else joint.bias.chunk(3)[2]
            values = F.linear(tokens, joint.weight.chunk(3)[2], bias)
        inner = getattr(attention, "norm", None) or nn.Identity()
        return self._project(attention.proj(inner(values)))
