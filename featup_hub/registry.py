"""The table of models: backbones, weights files and licences.

Only data: no import of torch, no network. timm names and loads a backbone's weights. Files shipped
in ``weights/`` have their digests here. timm's files on the Hugging Face Hub have none: their
newest version is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

__all__ = [
    "ALIASES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "JBU_UNIVERSAL",
    "MODELS",
    "UPSAMPLERS",
    "UPSAMPLER_ALIASES",
    "ModelCard",
    "WeightFile",
    "card",
    "shipped_upsampler",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights that is shipped with the package.

    Attributes:
        name: Content of the file, for messages.
        filename: Its name in the folder of shipped weights.
        sha256: Digest in hexadecimal.
        licence: Licence of the weights.
        data: Training data.
    """

    name: str
    filename: str
    sha256: str
    licence: str
    data: str


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One model: a backbone and the upsampler behind it.

    Attributes:
        name: The name given to ``featup_hub.load`` and ``torch.hub.load``.
        backbone: Name of the architecture and its weights in timm; None for an upsampler alone.
        kind: Kind of features: timm's own, or CLIP's in the space of its text embeddings ("clip":
            through the last block, "maskclip": its values only).
        feat_dim: Channels of the features; None if any number fits, or timm knows.
        patch_size: Stride of the source in pixels; None if any fits, or timm knows.
        image_size: Default short side of images, in pixels.
        mean: Normalisation of images, per channel. The same for every model: the upsampler reads
            colours, and backbones convert to their own normalisation.
        std: Divisor of the same normalisation.
        licence: Licence of the weights: the backbone's, or the upsampler's if it is alone.
        data: Training data of the weights.
        note: What a user must know before using them.
        backbone_file: Shipped weights of the backbone; None if timm downloads them.
        upsampler_file: Weights of the upsampler.
    """

    name: str
    backbone: str | None
    kind: Literal["timm", "clip", "maskclip"] = "timm"
    feat_dim: int | None
    patch_size: int | None
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str
    data: str
    note: str = ""
    backbone_file: WeightFile | None = None
    upsampler_file: WeightFile


JBU_UNIVERSAL = WeightFile(
    name="JBU stages for any backbone, behind a smoothing of cells",
    filename="jbu_universal.safetensors",
    sha256="d37ed996549d087da227e433167ff6d0a174fe0f28de575ca84fb391a315a0ce",
    licence="MIT",
    data="854 ImageNet photographs, no labels",
)

JBU_SHARP = WeightFile(
    name="JBU stages for any backbone",
    filename="jbu_sharp.safetensors",
    sha256="360520f16c281b7d7a6a530b1c0ac75e72e79dc4d05e82aaffe5df7676588414",
    licence="MIT",
    data="854 ImageNet photographs, no labels",
)

UPSAMPLERS: Mapping[str, WeightFile] = MappingProxyType(
    {"jbu_denoise": JBU_UNIVERSAL, "jbu_faithful": JBU_SHARP}
)
"""Shipped upsamplers: the first averages cells that look alike, the second keeps every cell."""

UPSAMPLER_ALIASES: Mapping[str, str] = MappingProxyType(
    {"jbu_universal": "jbu_denoise", "jbu_sharp": "jbu_faithful"}
)
"""Former names, which are still accepted."""


def shipped_upsampler(name: str) -> WeightFile | None:
    """Returns the file of a shipped upsampler by its name, or None if there is none."""
    return UPSAMPLERS.get(UPSAMPLER_ALIASES.get(name, name))


EFFICIENTNET_LITE0 = WeightFile(
    name="EfficientNet-Lite0",
    filename="efficientnet_lite0.safetensors",
    sha256="ea18890723cc53e4697ac3f14a1d8524b52e8e271a5860d88607cde528f6b9f6",
    licence="Apache-2.0",
    data="ImageNet-1k",
)


def card(name: str) -> ModelCard:
    """Returns a row of the table.

    Args:
        name: A model's name, or the name that Meta gives it.

    Returns:
        Its card.

    Raises:
        ValueError: If there is no such model; the message suggests the nearest names.

    Example:
        >>> card("dinov2").backbone
        'vit_small_patch14_dinov2.lvd142m'
    """
    name = ALIASES.get(name, name)
    if name in MODELS:
        return MODELS[name]
    known = {each.lower(): each for each in (*MODELS, *ALIASES)}
    near = [known[each] for each in get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is similar."
    raise ValueError(
        f"a model must be one of the names below; got {name!r}; {hint}\n"
        f"  {', '.join(MODELS)}\n"
        "  or any model of timm, such as 'convnext_tiny.fb_in1k'"
    )


class _Row(NamedTuple):
    """A row with a backbone and weights of timm."""

    name: str
    backbone: str
    feat_dim: int
    patch_size: int
    licence: str = "Apache-2.0"
    data: str = "ImageNet-1k"
    kind: Literal["timm", "clip", "maskclip"] = "timm"
    image_size: int = 224
    note: str = ""


_CLIP = "vit_base_patch16_clip_quickgelu_224.openai"
_WIT = "OpenAI's 400M image-text pairs (WIT)"
_LVD = "LVD-142M"
_DINOV3: Mapping[str, Any] = {
    "licence": "DINOv3 License",
    "data": "LVD-1689M",
    "image_size": 256,
    "note": "The DINOv3 License is not an open-source licence; read it before use.",
}

_TIMM = [
    # The names of FeatUp's own torch.hub entry points.
    _Row(
        "vit",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        384,
        16,
        data="ImageNet-21k, then ImageNet-1k",
    ),
    _Row("dino16", "vit_small_patch16_224.dino", 384, 16),
    _Row("dinov2", "vit_small_patch14_dinov2.lvd142m", 384, 14, data=_LVD),
    _Row("clip", _CLIP, 512, 16, data=_WIT, kind="clip"),
    _Row("maskclip", _CLIP, 512, 16, data=_WIT, kind="maskclip"),
    _Row("resnet50", "resnet50.tv_in1k", 2048, 32, licence="BSD-3-Clause"),
    # The rest of the families, named as their authors name them.
    _Row("dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 768, 14, data=_LVD),
    _Row("dinov2_vitl14", "vit_large_patch14_dinov2.lvd142m", 1024, 14, data=_LVD),
    _Row("dinov2_vitg14", "vit_giant_patch14_dinov2.lvd142m", 1536, 14, data=_LVD),
    _Row("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 384, 14, data=_LVD),
    _Row("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 768, 14, data=_LVD),
    _Row("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, 14, data=_LVD),
    _Row("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 14, data=_LVD),
    _Row("dinov3_vits16", "vit_small_patch16_dinov3.lvd1689m", 384, 16, **_DINOV3),
    _Row("dinov3_vitb16", "vit_base_patch16_dinov3.lvd1689m", 768, 16, **_DINOV3),
    _Row(
        "siglip2_vitb16",
        "vit_base_patch16_siglip_256.v2_webli",
        768,
        16,
        data="WebLI",
        image_size=256,
    ),
]

_LITE0 = ModelCard(
    name="efficientnet_lite0",
    backbone="tf_efficientnet_lite0.in1k",
    feat_dim=112,
    patch_size=16,
    licence=EFFICIENTNET_LITE0.licence,
    data=EFFICIENTNET_LITE0.data,
    backbone_file=EFFICIENTNET_LITE0,
    upsampler_file=JBU_UNIVERSAL,
)

_ROWS = [
    _LITE0,
    replace(
        _LITE0,
        name="efficientnet_lite0_stride32",
        feat_dim=320,
        patch_size=32,
    ),
    *(ModelCard(**row._asdict(), upsampler_file=JBU_UNIVERSAL) for row in _TIMM),
    ModelCard(
        name="jbu",
        backbone=None,
        feat_dim=None,
        patch_size=None,
        licence=JBU_UNIVERSAL.licence,
        data=JBU_UNIVERSAL.data,
        upsampler_file=JBU_UNIVERSAL,
    ),
]

MODELS: dict[str, ModelCard] = {row.name: row for row in _ROWS}

ALIASES: Mapping[str, str] = MappingProxyType(
    {
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
)
"""Names of Meta's own ``torch.hub`` entry points, with their names here or in timm."""
