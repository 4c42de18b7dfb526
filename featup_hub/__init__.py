"""High-resolution features from any vision backbone.

Importing this package has no side effects. Its modules are imported at first use::

    model = featup_hub.load("efficientnet_lite0")
    features = model(image)  # (1, 3, H, W) normalised by model.mean, model.std -> (1, C, H, W)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featup_hub.backbones import Backbone, ModuleBackbone, ShiftAndStitch, TimmBackbone
    from featup_hub.image import preprocess, read_image
    from featup_hub.loading import list_models, load, load_backbone, load_upsampler
    from featup_hub.model import UpsampledBackbone
    from featup_hub.ops import implementations
    from featup_hub.training.fit import fit
    from featup_hub.upsamplers import FittedFeatures, ImplicitUpsampler, JBUStack, JBUStage
    from featup_hub.visualize import comparison

__all__ = [
    "Backbone",
    "FittedFeatures",
    "ImplicitUpsampler",
    "JBUStack",
    "JBUStage",
    "ModuleBackbone",
    "ShiftAndStitch",
    "TimmBackbone",
    "UpsampledBackbone",
    "__version__",
    "comparison",
    "fit",
    "implementations",
    "list_models",
    "load",
    "load_backbone",
    "load_upsampler",
    "preprocess",
    "read_image",
]

__version__ = "0.1.0"

_HOMES = {
    "backbones": ("Backbone", "ModuleBackbone", "ShiftAndStitch", "TimmBackbone"),
    "image": ("preprocess", "read_image"),
    "loading": ("list_models", "load", "load_backbone", "load_upsampler"),
    "model": ("UpsampledBackbone",),
    "ops": ("implementations",),
    "training.fit": ("fit",),
    "upsamplers": ("FittedFeatures", "ImplicitUpsampler", "JBUStack", "JBUStage"),
    "visualize": ("comparison",),
}


def __getattr__(name: str) -> Any:
    """Imports a name at its first use, so that the command line starts without loading torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
