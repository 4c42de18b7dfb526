"""The one table of models: what looks at the image, which files it needs, whose they are.

Data only; nothing here imports torch or touches the network. Weights on the Hugging Face Hub
are named as timm names them (``timm.get_pretrained_cfg``; a test compares the two). The digests
and revisions of those files are None throughout, because the table was written without access
to the Hub: they are not checked against anything until somebody who has downloaded them fills
them in here. Files shipped in ``weights/`` have their digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

__all__ = [
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
    """A file of weights: where it is and whose it is.

    Attributes:
        name: What the file holds, for messages.
        filename: Its name in the folder of shipped weights or in the Hub repository.
        sha256: Digest in hexadecimal; None where nobody has seen the file yet.
        repo_id: Hugging Face Hub repository; None for a file that is only shipped.
        revision: Commit of that repository; None takes the newest.
        licence: Licence of the weights.
        data: What they were trained on.
        note: What a user must know before relying on them.
    """

    name: str
    filename: str
    sha256: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    licence: str
    data: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One model: a backbone and the upsampler behind it.

    Attributes:
        name: The name given to ``featup_hub.load`` and ``torch.hub.load``.
        backbone: Name of the architecture in timm; None for an upsampler alone.
        kind: Which features of that architecture: timm's own, or CLIP's in the space of its
            text embeddings ("clip": through the last block, "maskclip": its values only).
        feat_dim: Channels of the features; None where any number will do, or timm knows.
        patch_size: Stride of the source in pixels; None where any will do, or timm knows.
        image_size: Side in pixels to which an image is resized unless the user says otherwise.
        mean: Normalisation of images, per channel. The same for every model: the upsampler
            reads colours, and backbones convert to what they were trained with.
        std: Divisor of the same normalisation.
        backbone_file: Weights of the backbone.
        upsampler_file: Weights of the upsampler.
        scores: Measured figures, percent, by metric; those of ``weights/jbu_universal.md``, where
            protocol, intervals and what they compare with stand.
    """

    name: str
    backbone: str | None
    kind: Literal["timm", "clip", "maskclip"] = "timm"
    feat_dim: int | None
    patch_size: int | None
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    backbone_file: WeightFile | None
    upsampler_file: WeightFile
    scores: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def licence(self) -> str:
        """Licence of the weights: the backbone's, or the upsampler's where it is alone."""
        return (self.backbone_file or self.upsampler_file).licence

    @property
    def data(self) -> str:
        """What the backbone (or the upsampler, where it is alone) was trained on."""
        return (self.backbone_file or self.upsampler_file).data


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
        name: A model's name.

    Returns:
        Its card.

    Raises:
        ValueError: If there is no such model; the message suggests the nearest names.

    Example:
        >>> card("dinov2").backbone
        'vit_small_patch14_dinov2.lvd142m'
    """
    if name in MODELS:
        return MODELS[name]
    near = get_close_matches(name, MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is similar."
    raise ValueError(
        f"a model must be one of the names below; got {name!r}; {hint}\n"
        f"  {', '.join(MODELS)}\n"
        "  or any model of timm, such as 'convnext_tiny.fb_in1k'"
    )


def _timm(
    name: str,
    backbone: str,
    feat_dim: int,
    patch_size: int,
    licence: str,
    data: str,
    *,
    kind: Literal["timm", "clip", "maskclip"] = "timm",
    repo_id: str | None = None,
    image_size: int = 224,
    note: str = "",
) -> ModelCard:
    """A row whose backbone is timm's, with timm's weights on the Hub."""
    return ModelCard(
        name=name,
        backbone=backbone,
        kind=kind,
        feat_dim=feat_dim,
        patch_size=patch_size,
        image_size=image_size,
        backbone_file=WeightFile(
            name=backbone,
            filename="model.safetensors",
            repo_id=repo_id or f"timm/{backbone}",
            licence=licence,
            data=data,
            note=note,
        ),
        upsampler_file=JBU_UNIVERSAL,
    )


def _lite(name: str, feat_dim: int, patch_size: int, scores: Mapping[str, float]) -> ModelCard:
    """A row whose backbone is shipped."""
    return ModelCard(
        name=name,
        backbone="tf_efficientnet_lite0.in1k",
        feat_dim=feat_dim,
        patch_size=patch_size,
        backbone_file=EFFICIENTNET_LITE0,
        upsampler_file=JBU_UNIVERSAL,
        scores=MappingProxyType(scores),
    )


_APACHE = "Apache-2.0"
_IN1K = "ImageNet-1k"
_LVD = "LVD-142M"
_LVD3 = "LVD-1689M"
_DINOV3 = "DINOv3 License"
_DINOV3_NOTE = "The DINOv3 License is not an open-source licence; read it before use."
_CLIP = "vit_base_patch16_clip_quickgelu_224.openai"
_CLIP_REPO = "timm/vit_base_patch16_clip_224.openai"
_CLIP_DATA = "OpenAI's 400M image-text pairs (WIT)"

_ROWS = [
    _lite(
        "efficientnet_lite0",
        112,
        16,
        {
            "frozen probe, camvid/val, strip accuracy": 58.38,
            "frozen probe, camvid/val, mIoU": 46.81,
            "frozen probe, nyu/val, strip accuracy": 35.45,
            "frozen probe, nyu/val, mIoU": 10.34,
        },
    ),
    _lite(
        "efficientnet_lite0_stride32",
        320,
        32,
        {
            "frozen probe, camvid/val, strip accuracy": 55.68,
            "frozen probe, camvid/val, mIoU": 49.31,
            "frozen probe, nyu/val, strip accuracy": 44.30,
            "frozen probe, nyu/val, mIoU": 25.22,
        },
    ),
    # The names of FeatUp's own torch.hub entry points.
    _timm(
        "vit",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        384,
        16,
        _APACHE,
        "ImageNet-21k, then ImageNet-1k",
    ),
    _timm("dino16", "vit_small_patch16_224.dino", 384, 16, _APACHE, _IN1K),
    _timm("dinov2", "vit_small_patch14_dinov2.lvd142m", 384, 14, _APACHE, _LVD),
    _timm("clip", _CLIP, 512, 16, _APACHE, _CLIP_DATA, kind="clip", repo_id=_CLIP_REPO),
    _timm("maskclip", _CLIP, 512, 16, _APACHE, _CLIP_DATA, kind="maskclip", repo_id=_CLIP_REPO),
    _timm("resnet50", "resnet50.tv_in1k", 2048, 32, "BSD-3-Clause", _IN1K),
    # The rest of the families, named as their authors name them.
    _timm("dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 768, 14, _APACHE, _LVD),
    _timm("dinov2_vitl14", "vit_large_patch14_dinov2.lvd142m", 1024, 14, _APACHE, _LVD),
    _timm("dinov2_vitg14", "vit_giant_patch14_dinov2.lvd142m", 1536, 14, _APACHE, _LVD),
    _timm("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 384, 14, _APACHE, _LVD),
    _timm("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 768, 14, _APACHE, _LVD),
    _timm("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, 14, _APACHE, _LVD),
    _timm("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 14, _APACHE, _LVD),
    _timm(
        "dinov3_vits16",
        "vit_small_patch16_dinov3.lvd1689m",
        384,
        16,
        _DINOV3,
        _LVD3,
        image_size=256,
        note=_DINOV3_NOTE,
    ),
    _timm(
        "dinov3_vitb16",
        "vit_base_patch16_dinov3.lvd1689m",
        768,
        16,
        _DINOV3,
        _LVD3,
        image_size=256,
        note=_DINOV3_NOTE,
    ),
    _timm(
        "siglip2_vitb16",
        "vit_base_patch16_siglip_256.v2_webli",
        768,
        16,
        _APACHE,
        "WebLI",
        image_size=256,
    ),
    ModelCard(
        name="jbu",
        backbone=None,
        feat_dim=None,
        patch_size=None,
        backbone_file=None,
        upsampler_file=JBU_UNIVERSAL,
        scores=MappingProxyType(
            {
                "point oracle, camvid/val, strip accuracy": 73.78,
                "point oracle, camvid/val, mIoU": 74.72,
                "point oracle, nyu/val, strip accuracy": 75.26,
                "point oracle, nyu/val, mIoU": 93.13,
            }
        ),
    ),
]

MODELS: dict[str, ModelCard] = {row.name: row for row in _ROWS}
