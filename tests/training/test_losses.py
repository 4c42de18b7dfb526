"""Losses against explicit sums."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from featup_hub.training.losses import (
    ScaleNet,
    blur_residual,
    magnitude_tv,
    mean_magnitude,
    reconstruction_loss,
    sampled_crf,
)
from featup_hub.training.seeds import seeded


def test_reconstruction_is_the_gaussian_likelihood_without_its_constant():
    predicted, observed = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    scale = torch.rand(2, 1, 2, 2) + 0.5
    normal = torch.distributions.Normal(observed, scale)
    expected = -normal.log_prob(predicted).mean() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(reconstruction_loss(predicted, observed, scale), expected)
    assert float(reconstruction_loss(predicted, observed)) == pytest.approx(
        float((predicted - observed).square().mean()) / 2
    )


def test_scale_net_is_the_exponential_of_a_linear_map_with_a_floor():
    net, features = ScaleNet(4), torch.randn(2, 4, 3, 3)
    linear = torch.einsum("oc,bchw->bohw", net.net.weight.flatten(1), features) + net.net.bias
    torch.testing.assert_close(net(features), torch.exp(linear + 0.1))
    net.net.bias.data.fill_(-100)
    assert torch.equal(net(features), torch.full((2, 1, 3, 3), 1e-4))


def test_total_variation_and_the_mean_are_of_the_length_only():
    angle = torch.rand(1, 6, 7) * 6
    turning = 2 * torch.stack([angle.sin(), angle.cos()], 1)
    assert float(magnitude_tv(turning)) == pytest.approx(0, abs=1e-10)
    assert float(mean_magnitude(turning)) == pytest.approx(2)
    step = torch.zeros(1, 2, 4, 6)
    step[:, 0, :, 3:] = 5.0
    assert float(magnitude_tv(step)) == pytest.approx(25 / 5, rel=1e-4)  # 4 of 4 · 5 steps right
    zero = torch.zeros(1, 2, 3, 3, requires_grad=True)
    magnitude_tv(zero).backward()
    assert torch.isfinite(zero.grad).all()


def test_the_crf_is_the_double_sum_over_its_pixels():
    image, features = torch.randn(2, 3, 6, 9), torch.randn(2, 4, 6, 9)
    pixels = torch.randint(54, (11,), generator=seeded(5)).tolist()
    total = 0.0
    for b in range(2):
        for p in pixels:
            for q in pixels:
                (yp, xp), (yq, xq) = divmod(p, 9), divmod(q, 9)
                near = ((yp - yq) ** 2 + (xp - xq) ** 2) / 81
                alike = float((image[b, :, yp, xp] - image[b, :, yq, xq]).square().sum())
                differ = float((features[b, :, yp, xp] - features[b, :, yq, xq]).square().sum())
                total += differ * (
                    10 * math.exp(-near / (2 * 0.1) - alike / (2 * 0.15))
                    + 3 * math.exp(-near / (2 * 0.005))
                )
    loss = sampled_crf(image, features, samples=11, generator=seeded(5))
    assert float(loss) == pytest.approx(total / (2 * 11 * 11), rel=1e-4)


def test_the_blur_term_is_what_a_binomial_kernel_changes():
    x = torch.randn(2, 3, 7, 5)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    blurred = F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).reshape(x.shape)
    torch.testing.assert_close(blur_residual(x), (x - blurred).square().mean())
