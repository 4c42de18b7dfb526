"""Jitters: upstream's distributions; image and features move together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, apply_jitter, centres, sample_jitter, sample_map


def coordinates(height: int, width: int) -> torch.Tensor:
    """Every pixel's own position in the image, in fractions, (1, 2, H, W)."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    return torch.stack([y[:, None].expand(height, width), x.expand(height, width)])[None]


def mirrored(x: torch.Tensor) -> torch.Tensor:
    x = x.abs() % 2
    return torch.minimum(x, 2 - x)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([(64, 64), (48, 80), (70, 42)]),
    stride=st.sampled_from([1, 2, 7, 8]),
)
def test_a_map_of_any_stride_shows_the_point_the_jitter_names(seed, size, stride):
    jitter = sample_jitter(size, max_pad=10, max_zoom=2.5, generator=seeded(seed))
    height, width = size[0] // stride, size[1] // stride
    view = apply_jitter(coordinates(height, width).double(), [jitter])
    at = coordinates(height, width).double()
    x = 1 - at[:, 1] if jitter.flip else at[:, 1]
    y_true = mirrored(jitter.top + at[:, 0] / jitter.zoom)
    x_true = mirrored(jitter.left + x / jitter.zoom)
    # Interpolation repeats the border within half a pixel of it, where no line can be continued.
    inside = (
        ((y_true - 0.5).abs() < 0.5 - 0.5 / height) & ((x_true - 0.5).abs() < 0.5 - 0.5 / width)
    ).expand(1, height, width)
    assert inside.any()
    assert (view[:, 0] - y_true)[inside].abs().max() < 1e-5
    assert (view[:, 1] - x_true)[inside].abs().max() < 1e-5


def test_the_identity_is_exactly_the_identity():
    x = torch.randn(2, 3, 13, 9)
    assert torch.equal(apply_jitter(x, [Jitter()] * 2), x)
    half = apply_jitter(x, [Jitter(), Jitter(flip=True)])
    torch.testing.assert_close(half, torch.stack([x[0], x[1].flip(2)]), atol=1e-5, rtol=0)


def test_draws_follow_upstreams_distribution():
    generator = seeded(7)
    drawn = [
        sample_jitter((100, 200), max_pad=20, max_zoom=2, generator=generator) for _ in range(4000)
    ]
    zoomed = [j for j in drawn if j.zoom > 1]
    assert len(zoomed) / 4000 == pytest.approx(0.5, abs=0.03)
    assert sum(j.flip for j in drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    assert sum(j.zoom for j in zoomed) / len(zoomed) == pytest.approx(1.5, abs=0.03)
    assert max(j.zoom for j in drawn) < 2
    for j in drawn:
        assert j.top >= -0.2 - 1e-9
        assert j.top + 1 / j.zoom <= 1.2 + 1e-9
        assert j.left >= -0.1 - 1e-9
        assert j.left + 1 / j.zoom <= 1.1 + 1e-9
    plain = [j for j in drawn if j.zoom == 1]
    shifts = {round(j.top * 100, 6) for j in plain}
    assert shifts == set(range(-20, 21))


def test_maps_are_sampled_as_by_grid_sample():
    x = torch.randn(1, 3, 9, 12, dtype=torch.float64)
    rows, columns = torch.rand(2, 15, generator=seeded(1), dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(2 * columns - 1, 2 * rows - 1, indexing="xy"), -1)[None]
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(sample_map(x, rows, columns), expected)


def test_whole_pixels_are_copied_exactly_and_borders_repeated():
    x = torch.randn(2, 3, 40, 4)
    rows = (torch.tensor([-3, 0, 17, 39, 50]) + 0.5).double() / 40
    assert torch.equal(sample_map(x, rows, centres(4)), x[:, :, [0, 0, 17, 39, 39]])


def test_gradients_of_sampling_pass_gradcheck():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([-0.2, 0.1, 0.33, 0.9, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sample_map(x, at, at[:3]), (x,))
