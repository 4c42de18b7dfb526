"""Modules that upsample low-resolution features."""

from featup_hub.upsamplers.fitted import FittedFeatures, JBUFit
from featup_hub.upsamplers.implicit import ImplicitUpsampler
from featup_hub.upsamplers.jbu import FoldedHead, JBUStack
from featup_hub.upsamplers.joint import JointBilateralStage, JointKernels
from featup_hub.upsamplers.stage import JBUKernels, JBUPlan, JBUStage, stage_sizes

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
