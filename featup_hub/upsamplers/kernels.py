"""What a stack computes of an image once, and the check that it fits the features it meets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from featup_hub.upsamplers.joint import JointKernels

__all__ = ["JBUKernels"]


@dataclass(frozen=True, kw_only=True)
class JBUKernels:
    """Everything an upsampler needs to know of an image, for any number of feature maps.

    Attributes:
        source_size: Height and width of the features the kernels were planned for.
        stages: Kernels of each stage, (B, D², H, W), first to last; without those that have a
            joint bilateral stage beside them.
        first: The kernels of these; None where all stages are learned alone.
    """

    source_size: tuple[int, int]
    stages: tuple[Tensor, ...]
    first: JointKernels | None = None

    def check(self, source_size: tuple[int, int], *, joint_first: bool) -> None:
        """Refuses features of another size, and a stack of another kind.

        Args:
            source_size: Height and width of the features.
            joint_first: Whether the stack has a joint bilateral stage.

        Raises:
            ValueError: If these kernels are not for them.
        """
        if source_size != self.source_size:
            raise ValueError(
                f"these kernels are for features of size {self.source_size}; "
                f"got {source_size}; compute kernels(guidance, {source_size})"
            )
        if self.first is not None and not joint_first:
            raise ValueError(
                "this stack's first stage is a learned one; got kernels of a joint bilateral one; "
                "compute them with this stack's own kernels()"
            )
        if self.first is None and joint_first and self.stages:
            raise ValueError(
                "this stack's first stage has a joint bilateral one beside it; got kernels of "
                "learned stages alone; compute them with this stack's own kernels()"
            )
