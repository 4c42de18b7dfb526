"""Dense CLIP features in the space of its text embeddings.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
2021; the value path is that of Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022
(MaskCLIP).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.backbones.contract import Backbone
from featup_hub.backbones.timm import create

__all__ = ["ClipBackbone", "MaskClipBackbone"]


class ClipBackbone(Backbone):
    """CLIP's patch tokens, each projected as CLIP projects its class token.

    Args:
        name: A CLIP image tower of timm's. OpenAI's weights belong to the names with
            ``quickgelu``, whose activation is the one they were trained with.
        weights: What the file of that name on the Hub holds; None draws random weights.

    Raises:
        ValueError: If timm has no such network, it has no projection, or the weights do not fit.
    """

    def __init__(self, name: str, *, weights: Mapping[str, Tensor] | None = None) -> None:
        model, _ = create(name, weights)
        if not isinstance(getattr(model, "head", None), nn.Linear) or not hasattr(model, "blocks"):
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
        return self.model.head(self.model.norm(tokens)).movedim(-1, 1)


class MaskClipBackbone(ClipBackbone):
    """CLIP's patch tokens through the last block's values alone.

    The last attention mixes patches for the sake of the class token. Without its queries and
    keys, the block's second half and the residual, every token keeps describing its own patch.

    Args:
        name: A CLIP image tower of timm's, see :class:`ClipBackbone`.
        weights: What the file of that name on the Hub holds; None draws random weights.
    """

    def features(self, image: Tensor) -> Tensor:
        """Computes the projected values of the last block."""
        (tokens,) = self.model.forward_intermediates(
            image, indices=[-2], stop_early=True, intermediates_only=True
        )
        block = self.model.blocks[-1]
        tokens = block.norm1(tokens.movedim(1, -1))
        joint = block.attn.qkv  # the rows of the values are its last third
        values = F.linear(tokens, joint.weight.chunk(3)[2], joint.bias.chunk(3)[2])
        return self._project(block.attn.proj(values))
