"""The ``cuda`` implementation: the fused kernels, with the functions of ``torch_path``.

Nothing here waits for the device; everything is queued on torch's current stream of the
tensors' device.
"""

from __future__ import annotations

from featup_hub.ops.cuda_apply import (
    FEATURE_TYPES,
    apply,
    apply_backward,
    apply_backward_program,
    apply_obstacle,
    apply_program,
)
from featup_hub.ops.cuda_kernel import (
    kernel,
    kernel_backward,
    kernel_backward_program,
    kernel_obstacle,
    kernel_program,
    range_backward_program,
)
from featup_hub.ops.fused import Program

__all__ = [
    "apply",
    "apply_backward",
    "apply_obstacle",
    "kernel",
    "kernel_backward",
    "kernel_obstacle",
    "usual_programs",
]


def usual_programs() -> list[Program]:
    """Returns what an RGB image and features of any type need, forward and backward."""
    filters = [make(t) for make in (apply_program, apply_backward_program) for t in FEATURE_TYPES]
    predict = [
        make(3) for make in (kernel_program, kernel_backward_program, range_backward_program)
    ]
    return [*predict, *filters]
