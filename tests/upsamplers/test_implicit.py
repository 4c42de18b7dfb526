"""The implicit upsampler: its formula, consistent queries, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from featup_hub.upsamplers.coordinates import sample
from tests.upsamplers.small_implicit import make


def test_features_are_the_formula_written_out_for_one_pixel():
    module = make()
    frequencies = [math.exp(-1), math.exp(0.5), math.exp(2)]  # of log_range=(-1, 2)
    torch.testing.assert_close(module.fourier.frequency, torch.tensor(frequencies))
    row, column = 4, 7
    image = module.image[0]
    low, high = image.flatten(1).amin(1), image.flatten(1).amax(1)
    colour = (image[:, row, column] - low) / (high - low)
    signals = torch.cat([torch.tensor([(row + 0.5) / 9, (column + 0.5) / 13]), colour])
    angle = signals[:, None] * module.fourier.frequency
    x = torch.cat(
        [
            (angle + module.fourier.phase[0]).sin().flatten(),
            (angle + module.fourier.phase[1]).cos().flatten(),
            colour,
        ]
    )
    x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    for layer in module.layers[:2]:
        x = (layer.weight @ x + layer.bias).relu()
    z = module.layers[2].weight @ x + module.layers[2].bias
    expected = module.mean + module.directions @ z
    torch.testing.assert_close(module.features()[0, :, row, column], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [None, (5, 6), (20, 11), (1, 1)])
def test_tiles_do_not_change_the_features(size):
    module = make()
    whole = module.features(size)
    assert whole.shape[2:] == (size or (9, 13))
    for tile in (1, 29, 1000):
        torch.testing.assert_close(module.features(size, tile=tile), whole, atol=1e-5, rtol=1e-5)
    strips = dict(module.strips(size, tile=2 * whole.shape[3]))
    assert all(strip.shape[2] <= 2 for strip in strips.values())
    torch.testing.assert_close(torch.cat(list(strips.values()), 2), whole, atol=1e-5, rtol=1e-5)


def test_dropout_leaves_the_same_inputs_out_at_all_points_and_none_in_evaluation():
    module = make(dropout=0.5)
    module.directions, module.mean = torch.eye(4), torch.zeros(4)
    position = torch.full((6, 2), 0.4)
    told = module.train().coordinates(position)
    torch.testing.assert_close(told, told[:1].expand(6, -1))
    assert not torch.equal(told, module.coordinates(position))
    assert torch.equal(module.eval().coordinates(position), module.coordinates(position))


def test_gradients_reach_every_parameter():
    module = make()
    module.coordinates(torch.rand(50, 2)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_a_wrong_tile_or_dropout_is_refused():
    for tile in (0, -1):
        with pytest.raises(ValueError, match=f"tile must be at least 1, .*; got {tile}"):
            make().features(tile=tile)
    for dropout in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\); got {dropout}"):
            make(dropout=dropout)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (64, 3)])
def test_samples_are_grid_samples_with_borders_which_some_devices_lack(size, monkeypatch):
    x, position = torch.randn(1, 3, *size), torch.rand(500, 2)
    position[:4] = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    grid = (2 * position - 1).flip(1)[None, None]
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=False)[0, :, 0].t()
    plain = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda x, grid, align_corners: plain(
        x, grid, align_corners=align_corners
    ))  # fmt: skip
    torch.testing.assert_close(sample(x, position), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_does_not_darken_the_edges():
    x, edge = torch.ones(1, 2, 300, 300), torch.tensor([[1.0, 1.0], [0.0, 0.999], [0.9999, 0.5]])
    for low in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(sample(x.to(low), edge), torch.ones(3, 2), atol=1e-4, rtol=0)
