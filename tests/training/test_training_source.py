"""Projections: of features with the scale kept, and of stacks to kernels with sum one."""

from __future__ import annotations

import pytest
import torch

from featup_hub import JBUStack, ModuleBackbone
from featup_hub.training.jbu import make_unit_sum
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import Standardiser, TrainingSource, random_projection


def test_a_projection_has_orthonormal_rows_and_follows_its_generator():
    matrix = random_projection(50, 7, seeded(1))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(7), atol=1e-5, rtol=0)
    assert torch.equal(matrix, random_projection(50, 7, seeded(1)))
    with pytest.raises(ValueError, match="more directions than channels, 3; got 5; lower"):
        random_projection(3, 5, seeded(1))


def test_projecting_the_source_is_projecting_the_result():
    stack = JBUStack(num_stages=2).eval()
    source, image = torch.randn(1, 20, 4, 5), torch.randn(1, 3, 16, 20)
    matrix = random_projection(20, 6, seeded(0))
    project = lambda x: torch.einsum("kc,bchw->bkhw", matrix, x)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(
            stack(project(source), image), project(stack(source, image)), atol=1e-4, rtol=1e-4
        )


def test_standardised_channels_have_mean_zero_and_deviation_one():
    features = torch.randn(4, 5, 6, 7) * torch.tensor([1e-3, 1, 50, 3, 2])[:, None, None] + 9
    standardiser = Standardiser(5)
    standardiser.fit(features)
    out = standardiser(features).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std(1)[1:], torch.ones(4), atol=1e-3, rtol=0)
    assert out.std(1)[0] < 0.1  # a channel that hardly moves is not blown up


def test_kernels_sum_to_one_after_the_projection_and_not_before():
    stack = JBUStack()
    image = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        before = stack.up2.kernel(image, impl="reference").sum(1)
        make_unit_sum(stack)
        after = stack.up2.kernel(image, impl="reference").sum(1)
    torch.testing.assert_close(after, torch.ones_like(after), atol=1e-5, rtol=0)
    assert (before - 1).abs().max() > 1e-3


def test_the_projection_changes_nothing_it_need_not_and_is_final():
    stack = JBUStack()
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    make_unit_sum(stack)
    once = {name: value.clone() for name, value in stack.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    assert changed == {f"up{n}.fixup_proj.3.{p}" for n in range(1, 5) for p in ("weight", "bias")}
    moved = once["up1.fixup_proj.3.weight"] - before["up1.fixup_proj.3.weight"]
    assert float(moved.std(0).max()) < 1e-6  # every tap moves alike: the nearest such matrix
    make_unit_sum(stack)
    for name, value in stack.state_dict().items():
        torch.testing.assert_close(value, once[name], atol=1e-7, rtol=0)


def test_a_backbone_of_one_size_is_refused():
    pool = torch.nn.AvgPool2d(16)
    backbone = ModuleBackbone(pool, feat_dim=3, patch_size=16, fixed_size=(32, 32))
    with pytest.raises(ValueError, match=r"sees every image at \(32, 32\); use one that takes any"):
        TrainingSource(backbone)
