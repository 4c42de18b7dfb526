"""Backbones: networks with one common interface."""

from typing import TYPE_CHECKING

from featup_hub import _lazy

if TYPE_CHECKING:
    from featup_hub.backbones.clip import ClipBackbone, MaskClipBackbone
    from featup_hub.backbones.contract import Backbone, ChannelNorm
    from featup_hub.backbones.module import ModuleBackbone
    from featup_hub.backbones.stitch import ShiftAndStitch, root_of_looks
    from featup_hub.backbones.timm import TimmBackbone
    from featup_hub.backbones.timm_network import cached_file, create, is_timm_model, timm_card

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
    "root_of_looks",
    "timm_card",
]

__getattr__, __dir__ = _lazy(
    globals(), ("contract", "timm", "timm_network", "stitch", "module", "clip")
)
