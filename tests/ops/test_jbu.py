"""Errors of the operations."""

from __future__ import annotations

import pytest
import torch

from featup_hub.ops import jbu_apply, jbu_kernel
from featup_hub.upsamplers import JBUStage


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', .*got 'fast'"):
        jbu_kernel(torch.rand(1, 3, 4, 4), JBUStage().weights(), impl="fast")


@pytest.mark.parametrize("guidance", [torch.rand(1, 4, 4, 4), torch.rand(3, 4, 4)])
def test_guidance_that_is_no_image_is_refused(guidance: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"3 channels.*were source and guidance swapped"):
        jbu_kernel(guidance, JBUStage().weights())


def test_maps_of_different_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one batch size; got \(2, 4, 3, 3\) and \(1, 49, 6, 6\)"):
        jbu_apply(torch.rand(2, 4, 3, 3), torch.rand(1, 49, 6, 6))
