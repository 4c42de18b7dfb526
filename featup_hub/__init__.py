"""High-resolution features from any vision backbone.

Importing this package has no side effects. Its modules are imported at first use::

    model = featup_hub.load("efficientnet_lite0")
    features = model(image)  # (1, 3, H, W) normalised by model.mean, model.std -> (1, C, H, W)
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featup_hub.backbones import Backbone, ModuleBackbone, ShiftAndStitch, TimmBackbone
    from featup_hub.image import preprocess
    from featup_hub.loading import list_models, load, load_backbone, load_upsampler
    from featup_hub.model import UpsampledBackbone
    from featup_hub.ops import implementations
    from featup_hub.pixels import read_image
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


def _lazy(
    names: dict[str, Any], modules: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` of a package with these globals and modules.

    Names of ``__all__`` are imported at their first use, because the command line needs no torch
    and a model few of them.
    """
    package, public = names["__name__"], names["__all__"]

    def find(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        for module in modules if name in public else ():
            found = import_module(f"{package}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, lambda: sorted({*names, *public})


__getattr__, __dir__ = _lazy(
    globals(),
    ("ops", "loading", "upsamplers", "backbones", "model", "image", "visualize", "training.fit"),
)
