"""The table of models: backbones, weights files and licences.

Only data: no import of torch, no network. timm names and loads a backbone's weights. Files shipped
in ``weights/`` have their digests here. timm's files on the Hugging Face Hub have none: their
newest version is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights that is shipped with the package."""

    filename: str  # in the folder of shipped weights
    sha256: str  # in hexadecimal


UPSAMPLERS: Mapping[str, WeightFile] = {
    "jbu_denoise": WeightFile(
        filename="jbu_denoise.safetensors",
        sha256="d37ed996549d087da227e433167ff6d0a174fe0f28de575ca84fb391a315a0ce",
    ),
    "jbu_faithful": WeightFile(
        filename="jbu_faithful.safetensors",
        sha256="360520f16c281b7d7a6a530b1c0ac75e72e79dc4d05e82aaffe5df7676588414",
    ),
}
"""Shipped upsamplers: the first averages cells that look alike, the second keeps every cell."""

EFFICIENTNET_LITE0 = WeightFile(
    filename="efficientnet_lite0.safetensors",
    sha256="ea18890723cc53e4697ac3f14a1d8524b52e8e271a5860d88607cde528f6b9f6",
)


@dataclass(frozen=True)
class ModelCard:
    """One model: a backbone, and what a user must know of its weights."""

    name: str  # given to featup_hub.load and torch.hub.load
    backbone: str  # architecture and weights in timm; empty for an upsampler alone
    feat_dim: int | None  # channels of the features; None if any number fits, or timm knows
    patch_size: int | None  # stride of the source in pixels; None if any fits, or timm knows
    _: KW_ONLY
    # Kind of features: timm's own, or CLIP's in the space of its text embeddings, through the last
    # block (clip) or its values only (maskclip).
    kind: Literal["timm", "clip", "maskclip"] = "timm"
    image_size: int = 224  # default short side of images, in pixels
    licence: str = "Apache-2.0"  # of the weights: the backbone's, or the upsampler's if alone
    data: str = "ImageNet-1k"  # on which the weights were trained
    note: str = ""  # what a user must know before using them
    file: WeightFile | None = None  # shipped weights of the backbone; None if timm downloads them


_LITE0 = "tf_efficientnet_lite0.in1k"
_CLIP = "vit_base_patch16_clip_quickgelu_224.openai"
_WIT = "OpenAI's 400M image-text pairs (WIT)"
_LVD = "LVD-142M"
_DINOV3: Mapping[str, Any] = {
    "licence": "DINOv3 License",
    "data": "LVD-1689M",
    "image_size": 256,
    "note": "The DINOv3 License is not an open-source licence; read it before use.",
}

_ROWS = [
    ModelCard("efficientnet_lite0", _LITE0, 112, 16, file=EFFICIENTNET_LITE0),
    ModelCard("efficientnet_lite0_stride32", _LITE0, 320, 32, file=EFFICIENTNET_LITE0),
    # The names of FeatUp's own torch.hub entry points.
    ModelCard(
        "vit",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        384,
        16,
        data="ImageNet-21k, then ImageNet-1k",
    ),
    ModelCard("dino16", "vit_small_patch16_224.dino", 384, 16),
    ModelCard("dinov2", "vit_small_patch14_dinov2.lvd142m", 384, 14, data=_LVD),
    ModelCard("clip", _CLIP, 512, 16, data=_WIT, kind="clip"),
    ModelCard("maskclip", _CLIP, 512, 16, data=_WIT, kind="maskclip"),
    ModelCard("resnet50", "resnet50.tv_in1k", 2048, 32, licence="BSD-3-Clause"),
    # The rest of the families, named as their authors name them.
    ModelCard("dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 768, 14, data=_LVD),
    ModelCard("dinov2_vitl14", "vit_large_patch14_dinov2.lvd142m", 1024, 14, data=_LVD),
    ModelCard("dinov2_vitg14", "vit_giant_patch14_dinov2.lvd142m", 1536, 14, data=_LVD),
    ModelCard("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 384, 14, data=_LVD),
    ModelCard("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 768, 14, data=_LVD),
    ModelCard("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, 14, data=_LVD),
    ModelCard("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 14, data=_LVD),
    ModelCard("dinov3_vits16", "vit_small_patch16_dinov3.lvd1689m", 384, 16, **_DINOV3),
    ModelCard("dinov3_vitb16", "vit_base_patch16_dinov3.lvd1689m", 768, 16, **_DINOV3),
    ModelCard(
        "siglip2_vitb16",
        "vit_base_patch16_siglip_256.v2_webli",
        768,
        16,
        data="WebLI",
        image_size=256,
    ),
    ModelCard("jbu", "", None, None, licence="MIT", data="854 ImageNet photographs, no labels"),
]

MODELS: Mapping[str, ModelCard] = {row.name: row for row in _ROWS}

ALIASES: Mapping[str, str] = {
    "dino_vits16": "dino16",
    "dino_vits8": "timm/vit_small_patch8_224.dino",
    "dino_vitb16": "timm/vit_base_patch16_224.dino",
    "dino_vitb8": "timm/vit_base_patch8_224.dino",
    "dinov2_vits14": "dinov2",
    "dinov3_vits16plus": "timm/vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3_vitl16": "timm/vit_large_patch16_dinov3.lvd1689m",
    "dinov3_vith16plus": "timm/vit_huge_plus_patch16_dinov3.lvd1689m",
    "dinov3_vit7b16": "timm/vit_7b_patch16_dinov3.lvd1689m",
    "dinov3_convnext_tiny": "timm/convnext_tiny.dinov3_lvd1689m",
    "dinov3_convnext_small": "timm/convnext_small.dinov3_lvd1689m",
    "dinov3_convnext_base": "timm/convnext_base.dinov3_lvd1689m",
    "dinov3_convnext_large": "timm/convnext_large.dinov3_lvd1689m",
}
"""Names of Meta's own ``torch.hub`` entry points, with their names here or in timm."""
