"""Modules that upsample low-resolution features."""

from typing import TYPE_CHECKING, Any

from featup_hub import _imported

if TYPE_CHECKING:
    from featup_hub.upsamplers.fitted import FittedFeatures, JBUFit
    from featup_hub.upsamplers.head import FoldedHead
    from featup_hub.upsamplers.implicit import ImplicitUpsampler
    from featup_hub.upsamplers.jbu import JBUStack
    from featup_hub.upsamplers.joint import JointBilateralStage, JointKernels
    from featup_hub.upsamplers.plan import JBUKernels, JBUPlan, stage_sizes
    from featup_hub.upsamplers.stage import JBUStage

__all__ = [
    "FittedFeatures",
    "FoldedHead",
    "ImplicitUpsampler",
    "JBUFit",
    "JBUKernels",
    "JBUPlan",
    "JBUStack",
    "JBUStage",
    "JointBilateralStage",
    "JointKernels",
    "stage_sizes",
]


_MODULES = ("jbu", "stage", "plan", "joint", "head", "fitted", "implicit")


def __getattr__(name: str) -> Any:
    """Imports a name at its first use, because a model needs few of them."""
    return _imported(__name__, name, _MODULES if name in (*__all__, *_MODULES) else ())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
