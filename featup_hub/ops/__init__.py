"""What is computed: the joint bilateral upsampler's two operations and their implementations."""

from featup_hub.ops.choice import implementations
from featup_hub.ops.jbu import Implementation, jbu_apply, jbu_kernel
from featup_hub.ops.reference import StageWeights, pool_guidance

__all__ = [
    "Implementation",
    "StageWeights",
    "implementations",
    "jbu_apply",
    "jbu_kernel",
    "pool_guidance",
]
