"""Interpolation along an axis: equal to PyTorch, and deterministic on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from featup_hub.ops import reference
from featup_hub.training.config import JBUTrainingConfig
from featup_hub.training.objective import consistency_loss
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import TrainingSource
from featup_hub.training.views import sample_axis, sample_map
from featup_hub.upsamplers import JBUStack
from tests.determinism import REFUSED, Recorder


def middles(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("size", [(14, 10), (3, 23), (1, 1), (7, 5)])
def test_it_resizes_as_interpolate_does(size):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(sample_map(x, *map(middles, size)), expected)


def test_it_samples_where_grid_sample_does():
    x = torch.randn(1, 3, 9, 12, dtype=torch.float64)
    rows, columns = torch.rand(2, 15, generator=seeded(1), dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(2 * columns - 1, 2 * rows - 1, indexing="xy"), -1)[None]
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(sample_map(x, rows, columns), expected)


def test_whole_pixels_are_copied_exactly_and_borders_repeated():
    x = torch.randn(2, 3, 40, 4)
    picked = sample_axis(x, (torch.tensor([-3, 0, 17, 39, 50]) + 0.5).double() / 40, 2)
    assert torch.equal(picked, x[:, :, [0, 0, 17, 39, 39]])


def test_gradients_are_right():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([-0.2, 0.1, 0.33, 0.9, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sample_map(x, at, at[:3]), (x,))


CONFIG = JBUTrainingConfig(
    views=2,
    max_pad=4,
    projection_dim=6,
    crf_samples=50,
    tv_weight=0.1,
    region_weight=1.0,
    region_field=1.0,
    window=1.5,
)


@pytest.mark.parametrize("joint_first", [False, True])
@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_a_training_step_has_no_operation_without_a_deterministic_form(
    stem, downsampler, joint_first, monkeypatch
):
    # The way of a GPU, where torch's own pooling is not taken for guidance with a gradient.
    for module in ("jbu", "joint"):
        name = f"featup_hub.upsamplers.{module}.pool_guidance"
        monkeypatch.setattr(name, reference.pool_guidance)
    config = replace(CONFIG, downsampler=downsampler)
    source = TrainingSource(stem, downsampler=downsampler, window=config.window)
    rgb = torch.rand(2, 3, 32, 48, generator=seeded(8))
    with Recorder() as recorder:
        stack = JBUStack(joint_first=joint_first)
        terms = consistency_loss(stack, source, rgb, (40, 56), config, seeded(3))
        terms["loss"].backward()
    assert {"jbu_apply_backward", "jbu_kernel_backward", "index_select"} <= recorder.names
    assert not recorder.names & REFUSED
