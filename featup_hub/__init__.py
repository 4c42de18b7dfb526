"""High-resolution features from any vision backbone.

Importing this package needs torch only and changes nothing in the process::

    model = featup_hub.load("efficientnet_lite0")
    features = model(image)  # (1, 3, H, W) normalised by model.mean, model.std -> (1, C, H, W)
"""

from typing import TYPE_CHECKING, Any

from featup_hub.backbones import Backbone, ModuleBackbone, ShiftAndStitch, TimmBackbone
from featup_hub.model import (
    UpsampledBackbone,
    list_models,
    load,
    load_backbone,
    load_upsampler,
)
from featup_hub.ops import implementations
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack, JBUStage

if TYPE_CHECKING:
    from featup_hub.training.implicit import fit

__all__ = [
    "Backbone",
    "ImplicitUpsampler",
    "JBUStack",
    "JBUStage",
    "ModuleBackbone",
    "ShiftAndStitch",
    "TimmBackbone",
    "UpsampledBackbone",
    "__version__",
    "fit",
    "implementations",
    "list_models",
    "load",
    "load_backbone",
    "load_upsampler",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the fit of an implicit upsampler when it is asked for: research is not loaded."""
    if name == "fit":
        from featup_hub.training.implicit import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
