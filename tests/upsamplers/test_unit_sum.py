"""Kernels that sum to one: initially, in training, and in saved files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from featup_hub import JBUStack, load_upsampler
from tests.ops.formulations import randomise


def trained(upsampler: JBUStack) -> JBUStack:
    optimiser = torch.optim.Adam(upsampler.parameters(), lr=0.05)
    source, image = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 32, 48)
    for _ in range(5):
        optimiser.zero_grad()
        upsampler(source, image).square().mean().backward()
        optimiser.step()
    return upsampler.eval()


def error(upsampler: nn.Module) -> float:
    """How far a constant 1 is from 1 at the output."""
    with torch.no_grad():
        ones = upsampler(torch.ones(1, 1, 4, 5), torch.randn(1, 3, 64, 80))
    return float((ones - 1).abs().max())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_constant_stays_as_it_is_after_training(pretrained, train):
    assert error(trained(load_upsampler(pretrained=pretrained).train(train))) < 1e-5


def test_what_was_trained_keeps_its_unit_sum_in_every_file(tmp_path):
    upsampler = trained(load_upsampler())
    save_file(upsampler.state_dict(), tmp_path / "stages.safetensors")
    upsampler.save_pretrained(tmp_path / "folder")
    plain = JBUStack(joint_first=True).eval()  # knows nothing of sums
    plain.load_state_dict(upsampler.state_dict())
    copies = {
        "load_upsampler": load_upsampler(tmp_path / "stages.safetensors"),
        "from_pretrained": JBUStack.from_pretrained(tmp_path / "folder"),
        "load_state_dict": plain,
        "deepcopy": copy.deepcopy(upsampler),
        "pickle": pickle.loads(pickle.dumps(upsampler)),
    }
    source, image = torch.randn(1, 4, 4, 5), torch.randn(1, 3, 64, 80)
    expected = upsampler(source, image)
    for name, other in copies.items():
        torch.testing.assert_close(other(source, image), expected, atol=1e-4, rtol=1e-4)
        if name != "load_state_dict":
            assert error(trained(other)) < 1e-5, name


def test_an_average_of_weights_is_written_through_the_state_dict():
    model, average = load_upsampler(pretrained=False), load_upsampler(pretrained=False)
    # As timm's ModelEma does.
    for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mean.copy_(new)
    source, image = torch.randn(1, 4, 4, 5), torch.randn(1, 3, 64, 80)
    torch.testing.assert_close(average(source, image), model(source, image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_in_half_precision_keeps_its_unit_sum(tmp_path, dtype):
    state = trained(load_upsampler()).to(dtype).state_dict()
    save_file(state, tmp_path / "half.safetensors")
    assert error(load_upsampler(tmp_path / "half.safetensors")) < 1e-5


def test_a_stack_without_unit_sum_keeps_the_sums_it_was_given():
    assert error(randomise(JBUStack(unit_sum=False))) > 1e-2
    assert error(randomise(JBUStack(unit_sum=True))) < 1e-4


def test_a_correction_that_sums_to_zero_can_be_called_as_a_layer():
    stage = randomise(JBUStack(unit_sum=True)).up1
    output = stage.fixup_proj(torch.randn(2, 52, 3, 4))
    torch.testing.assert_close(output.sum(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)


def test_a_network_that_holds_a_folded_head_is_saved():
    network = nn.ModuleDict({"decode": load_upsampler().fold_head(nn.Conv2d(4, 2, 1))})
    assert save(network.state_dict())
