"""The definition against an independent formulation, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featup_hub.ops import reference
from featup_hub.upsamplers import JBUStage
from tests.ops.formulations import randomise, stage_apply, stage_kernel


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (3, 3), (4, 5), (11, 8)])
@pytest.mark.parametrize("radius", [1, 3])
def test_kernels_are_those_of_the_unfold_formulation(size, radius):
    stage = randomise(JBUStage(3, 8, radius).double())
    guidance = torch.randn(2, 3, *size, dtype=torch.float64)
    kernel = reference.jbu_kernel(guidance, stage.weights())
    torch.testing.assert_close(kernel, stage_kernel(stage, guidance), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("source", "output"), [((1, 1), (2, 2)), ((3, 4), (6, 8)), ((3, 5), (5, 7))]
)
def test_filtering_is_that_of_the_unfold_formulation(source, output):
    features = torch.randn(2, 3, *source, dtype=torch.float64)
    kernel = torch.randn(2, 49, *output, dtype=torch.float64)
    filtered = reference.jbu_apply(features, kernel)
    torch.testing.assert_close(filtered, stage_apply(features, kernel), rtol=0, atol=1e-12)


def test_a_kernel_of_one_in_the_middle_is_bicubic_interpolation():
    source = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    kernel = torch.zeros(1, 49, 10, 12, dtype=torch.float64)
    kernel[:, 24] = 1
    expected = F.interpolate(source, (10, 12), mode="bicubic", align_corners=False)
    torch.testing.assert_close(reference.jbu_apply(source, kernel), expected)


def test_tap_t_reads_row_t_div_7_and_column_t_mod_7():
    source = torch.arange(64.0).view(1, 1, 8, 8)
    kernel = torch.zeros(1, 49, 8, 8)
    kernel[:, 7 * 1 + 5] = 1  # two up, two right
    shifted = reference.jbu_apply(source, kernel)
    assert shifted[0, 0, 4, 3] == source[0, 0, 2, 5]


def test_before_the_correction_kernels_sum_to_one_and_uniform_guidance_gives_the_spatial_term():
    stage = JBUStage()
    with torch.no_grad():
        for parameter in stage.fixup_proj.parameters():
            parameter.zero_()
    kernel = reference.jbu_kernel(torch.full((1, 3, 9, 9), 0.3), stage.weights())
    spatial = reference.spatial_logits(torch.tensor(1.0), 7).softmax(0)
    torch.testing.assert_close(kernel[0, :, 4, 4], spatial)
    torch.testing.assert_close(kernel.sum(1), torch.ones(1, 9, 9))


def test_a_vanishing_spatial_term_is_clamped_and_not_renormalised():
    stage = randomise(JBUStage(3, 8).double())
    with torch.no_grad():
        stage.sigma_spatial.fill_(0.02)
        stage.range_temp.fill_(6.0)
        for parameter in stage.fixup_proj.parameters():
            parameter.zero_()
    guidance = 3 * torch.randn(1, 3, 12, 12, dtype=torch.float64)
    sums = reference.jbu_kernel(guidance, stage.weights()).sum(1)
    assert (sums < 0.5).any()  # the case at hand occurs ...
    torch.testing.assert_close(sums, stage_kernel(stage, guidance).sum(1))  # ... and is upstream's


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (4, 4), (9, 7)])
def test_padding_mirrors_as_numpy_does(size):
    x = torch.randn(1, 1, *size)
    padded = reference.reflect_pad(x, 3)[0, 0].numpy()
    expected = x[0, 0].numpy()
    for axis, n in enumerate(size):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (3, 3)
        expected = np.pad(expected, pad, mode="reflect" if n > 1 else "edge")
    np.testing.assert_array_equal(padded, expected)


@pytest.mark.parametrize("size", [(5, 7), (32, 28), (37, 53), (64, 80)])
def test_pooling_by_matrices_is_adaptive_average_pooling(size):
    image = torch.rand(2, 3, 37, 53, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(image, size)
    torch.testing.assert_close(reference.pool_guidance(image, size), expected)
