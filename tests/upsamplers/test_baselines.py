"""The baselines, and the properties of the joint bilateral filter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.upsamplers.baselines import bicubic, bilinear, joint_bilateral, nearest

ALL = [nearest, bilinear, bicubic, joint_bilateral]


@pytest.mark.parametrize("upsample", ALL)
@pytest.mark.parametrize(
    ("cells", "size"), [((3, 4), (12, 16)), ((1, 1), (5, 7)), ((4, 3), (9, 7))]
)
def test_a_constant_source_stays_constant(upsample, cells, size):
    image = torch.randn(2, 3, *size)
    output = upsample(torch.full((2, 5, *cells), 3.0), image, size)
    assert output.shape == (2, 5, *size)
    torch.testing.assert_close(output, torch.full_like(output, 3.0))


@pytest.mark.parametrize("upsample", ALL)
def test_a_linear_head_commutes_with_every_baseline(upsample):
    source, image = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 16, 20)
    head = torch.randn(3, 6, 1, 1)
    before = upsample(F.conv2d(source, head), image, (16, 20))
    after = F.conv2d(upsample(source, image, (16, 20)), head)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_joint_bilateral_equals_the_formula_summed_pixel_by_pixel():
    source, image = torch.randn(1, 2, 3, 2).double(), torch.randn(1, 3, 9, 8).double()
    radius, spatial, colour = 1, 0.6, 0.7
    output = joint_bilateral(
        source, image, (9, 8), radius=radius, sigma_spatial=spatial, sigma_range=colour
    )
    coarse = F.adaptive_avg_pool2d(image, (3, 2))
    for i in range(9):
        for j in range(8):
            y, x = (i + 0.5) / 3 - 0.5, (j + 0.5) / 4 - 0.5
            total, norm = torch.zeros(2).double(), 0.0
            for a in range(max(round(y) - radius, 0), min(round(y) + radius, 2) + 1):
                for b in range(max(round(x) - radius, 0), min(round(x) + radius, 1) + 1):
                    distance = (y - a) ** 2 + (x - b) ** 2
                    difference = (image[0, :, i, j] - coarse[0, :, a, b]).square().sum()
                    weight = torch.exp(
                        torch.tensor(-distance / (2 * spatial**2)) - difference / (2 * colour**2)
                    )
                    total, norm = total + weight * source[0, :, a, b], norm + weight
            torch.testing.assert_close(output[0, :, i, j], total / norm)


def test_colours_far_from_every_cell_still_give_finite_features():
    image = torch.zeros(1, 3, 8, 8)
    image[..., 3, 3] = 1e3
    output = joint_bilateral(torch.randn(1, 2, 2, 2), image, (8, 8), sigma_range=0.01)
    assert output.isfinite().all()
