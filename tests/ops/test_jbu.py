"""Errors of the operations."""

from __future__ import annotations

import pytest
import torch

from featup_hub.ops import jbu_apply, jbu_kernel
from featup_hub.upsamplers import JBUStage


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', .*got 'fast'"):
        jbu_kernel(torch.rand(1, 3, 4, 4), JBUStage().weights(), impl="fast")


@pytest.mark.parametrize("guidance", [torch.rand(1, 4, 4, 4), torch.rand(3, 4, 4)])
def test_guidance_that_is_no_image_is_refused(guidance):
    with pytest.raises(ValueError, match=r"3 channels.*were source and guidance swapped"):
        jbu_kernel(guidance, JBUStage().weights())


def test_what_is_no_tensor_on_the_same_device_is_refused():
    source, kernel, weights = torch.rand(1, 4, 3, 3), torch.rand(1, 49, 6, 6), JBUStage().weights()
    with pytest.raises(
        TypeError, match=r"guidance must be a tensor; got ndarray; model\.preprocess\(photo\) m"
    ):
        jbu_kernel(torch.rand(1, 3, 4, 4).numpy(), weights)
    with pytest.raises(TypeError, match=r"kernel must be floating-point, .*; got torch.int32"):
        jbu_apply(source, kernel.int())
    with pytest.raises(ValueError, match="needed; got guidance on meta and weights on cpu; move"):
        jbu_kernel(torch.rand(1, 3, 4, 4, device="meta"), weights)
    with pytest.raises(ValueError, match="needed; got source on cpu and kernel on meta; move one"):
        jbu_apply(source, kernel.to("meta"))


@pytest.mark.parametrize("taps", [50, 16])
def test_taps_that_make_no_square_with_a_middle_are_refused(taps):
    with pytest.raises(ValueError, match=f"D² taps with D odd, such as 49; got {taps}"):
        jbu_apply(torch.rand(1, 4, 3, 3), torch.rand(1, taps, 6, 6), impl="reference")


def test_maps_of_different_batch_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one batch size; got \(2, 4, 3, 3\) and \(1, 49, 6, 6\)"):
        jbu_apply(torch.rand(2, 4, 3, 3), torch.rand(1, 49, 6, 6))
