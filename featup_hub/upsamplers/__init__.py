"""Modules that upsample low-resolution features."""

from typing import TYPE_CHECKING

from featup_hub import _lazy

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

__getattr__, __dir__ = _lazy(
    globals(), ("jbu", "stage", "plan", "joint", "head", "fitted", "implicit")
)
