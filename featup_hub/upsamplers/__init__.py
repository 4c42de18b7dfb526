"""What learns: modules that turn low-resolution features into high-resolution ones."""

from featup_hub.upsamplers.head import FoldedHead
from featup_hub.upsamplers.implicit import ImplicitUpsampler
from featup_hub.upsamplers.jbu import JBUStack
from featup_hub.upsamplers.joint import JointBilateralStage, JointKernels
from featup_hub.upsamplers.kernels import JBUKernels
from featup_hub.upsamplers.sizes import stage_sizes
from featup_hub.upsamplers.stage import JBUStage

__all__ = [
    "FoldedHead",
    "ImplicitUpsampler",
    "JBUKernels",
    "JBUStack",
    "JBUStage",
    "JointBilateralStage",
    "JointKernels",
    "stage_sizes",
]
