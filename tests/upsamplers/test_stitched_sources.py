"""Sources of several looks: each look is smoothed separately."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featup_hub import JBUStack, ModuleBackbone, ShiftAndStitch, UpsampledBackbone
from featup_hub.upsamplers import JointBilateralStage
from featup_hub.upsamplers.tiled import upsample_tiled


def smoothed(
    cells: torch.Tensor, image: torch.Tensor, count: int, sigma: float = 1.5
) -> torch.Tensor:
    """Smooths a source by a stage, and upsamples by nothing."""
    stage = JointBilateralStage(share=0.0, smoothing_spatial=sigma)
    unit = torch.zeros(len(cells), 49, *cells.shape[2:])
    unit[:, 24] = 1
    size = (cells.shape[2], cells.shape[3])
    return stage(cells, stage.kernels(image, size, [unit], looks_per_side=count))


@pytest.mark.parametrize(
    ("count", "size", "cell"),
    [
        *((2, (8, 10), (3, 4)), (3, (9, 12), (3, 4)), (2, (7, 9), (3, 4))),
        *((2, (7, 9), (6, 8)), (3, (7, 8), (6, 7))),  # the last cell, where looks differ in size
    ],
)
def test_a_cell_is_averaged_with_cells_of_its_own_look_alone(count, size, cell):
    cells = torch.zeros(1, 1, *size)
    cells[0, 0, cell[0], cell[1]] = 1
    reached = smoothed(cells, torch.zeros(1, 3, 48, 48), count)[0, 0] > 0
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    own = (rows % count == cell[0] % count) & (columns % count == cell[1] % count)
    assert not (reached & ~own).any()
    assert (reached & own).sum() > 4


def test_a_look_is_smoothed_twice_as_wide_as_a_source_of_one_look_and_keeps_a_part():
    looks, image = torch.randn(1, 4, 2, 5, 6), torch.full((1, 3, 80, 96), 0.5)
    source = F.pixel_shuffle(looks.movedim(1, 2).flatten(1, 2), 2)
    stitched = smoothed(source, image, 2)
    for index in range(4):
        look = looks[:, index]
        expected = 0.3 * look + 0.7 * smoothed(look, image, 1, sigma=3.0)
        torch.testing.assert_close(stitched[:, :, index // 2 :: 2, index % 2 :: 2], expected)


def test_cells_across_an_edge_are_not_averaged():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 3
    source = F.adaptive_avg_pool2d(image, 8)
    assert (smoothed(source, image, 2) - source).abs().max() < 0.05


def test_a_model_tells_its_upsampler_of_the_looks_and_leaves_the_users_as_it_was():
    backbone = ModuleBackbone(nn.Conv2d(3, 5, 8, 8), feat_dim=5, patch_size=8)
    stack = JBUStack(joint_first=True).eval()
    model = UpsampledBackbone(ShiftAndStitch(backbone, 2), stack).eval()
    image = torch.randn(1, 3, 48, 64)

    assert (model.stack.looks_per_side, stack.looks_per_side) == (2, 1)
    assert set(model.stack.parameters()) == set(stack.parameters())
    head = nn.Conv2d(5, 3, 1)
    torch.testing.assert_close(model.fold_head(head)(image), head(model(image)))
    tiles = upsample_tiled(model.stack, model.source(image), image, max_bytes=6_000_000)
    torch.testing.assert_close(tiles, model(image))


def test_gradients_reach_a_stitched_source_and_the_widths_of_the_smoothing():
    stack = JBUStack(joint_first=True)
    stack.looks_per_side = 2
    source = torch.randn(1, 2, 6, 8, requires_grad=True)
    stack(source, torch.randn(1, 3, 24, 32)).square().sum().backward()
    assert source.grad is not None
    assert source.grad.abs().min() > 0
    assert stack.first is not None
    assert stack.first.smoothing_spatial.grad
