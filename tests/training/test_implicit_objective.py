"""What a fit minimises besides the views: terms by their formulas, each lowering what it names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from featup_hub.training.implicit import fit
from featup_hub.training.losses import blur_residual, magnitude_tv, mean_magnitude
from tests.training.implicit_example import TINY, Blur, picture


def test_the_blur_term_is_what_a_binomial_kernel_changes() -> None:
    x = torch.randn(2, 3, 7, 5)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    blurred = F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).reshape(x.shape)
    torch.testing.assert_close(blur_residual(x), (x - blurred).square().mean())
    assert float(blur_residual(torch.full((1, 2, 4, 4), 3.0))) == 0
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert float(blur_residual(checks)) > 0.5  # what the kernel takes out most


def test_the_magnitude_is_the_mean_length() -> None:
    x = torch.zeros(1, 2, 2, 2)
    x[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    assert float(mean_magnitude(x)) == pytest.approx(5 / 4, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("magnitude_weight", mean_magnitude),
        ("tv_weight", magnitude_tv),
        ("blur_weight", blur_residual),
    ],
)
def test_each_term_lowers_what_it_punishes(name: str, term) -> None:
    none = {"magnitude_weight": 0.0, "tv_weight": 0.0, "blur_weight": 0.0}
    config = replace(TINY, steps=40, check_every=40, base="none", **none)
    lengths = []
    for weight in (0.0, 30.0):
        upsampler = fit(picture(), Blur(), replace(config, **{name: weight}))
        coordinates = torch.einsum(
            "kc,bchw->bkhw",
            torch.linalg.pinv(upsampler.directions),
            upsampler.features() - upsampler.mean[:, None, None],
        )
        lengths.append(float(term(coordinates)))
    assert lengths[1] < 0.7 * lengths[0]
