"""Backbones: networks with one common interface."""

from typing import TYPE_CHECKING, Any

from featup_hub import _imported

if TYPE_CHECKING:
    from featup_hub.backbones.clip import ClipBackbone, MaskClipBackbone
    from featup_hub.backbones.contract import Backbone, ChannelNorm
    from featup_hub.backbones.module import ModuleBackbone
    from featup_hub.backbones.stitch import ShiftAndStitch
    from featup_hub.backbones.timm import TimmBackbone, timm_card
    from featup_hub.backbones.timm_network import cached_file, create, is_timm_model

__all__ = [
    "Backbone",
    "ChannelNorm",
    "ClipBackbone",
    "MaskClipBackbone",
    "ModuleBackbone",
    "ShiftAndStitch",
    "TimmBackbone",
    "cached_file",
    "create",
    "is_timm_model",
    "timm_card",
]


_MODULES = ("contract", "timm", "timm_network", "stitch", "module", "clip")


def __getattr__(name: str) -> Any:
    """Imports a name at its first use, because a model needs few of them."""
    return _imported(__name__, name, _MODULES if name in (*__all__, *_MODULES) else ())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
