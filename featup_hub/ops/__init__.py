"""The joint bilateral upsampler's operations and their implementations."""

from featup_hub.ops.choice import implementations
from featup_hub.ops.jbu import (
    Implementation,
    jbu_apply,
    jbu_kernel,
    joint_kernel,
    pool_guidance,
)
from featup_hub.ops.reference import StageWeights

__all__ = [
    "Implementation",
    "StageWeights",
    "implementations",
    "jbu_apply",
    "jbu_kernel",
    "joint_kernel",
    "pool_guidance",
]
