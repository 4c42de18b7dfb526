"""What learns: modules that turn low-resolution features into high-resolution ones."""

from featup_hub.upsamplers.implicit import ImplicitUpsampler
from featup_hub.upsamplers.jbu import FoldedHead, JBUKernels, JBUStack, JBUStage, stage_sizes

__all__ = ["FoldedHead", "ImplicitUpsampler", "JBUKernels", "JBUStack", "JBUStage", "stage_sizes"]
