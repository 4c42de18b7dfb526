"""Stacks with the shape of a file, also of a damaged file."""

from __future__ import annotations

import pytest
import torch

from featup_hub.loading import load_upsampler
from featup_hub.upsamplers import JBUStack
from featup_hub.weights import write

CLOSING = "fixup_proj.1.weight"


@pytest.mark.parametrize(("count", "feat_dim"), [(1, None), (4, 6), (5, None)])
def test_a_stack_of_any_number_of_stages_comes_back_from_its_file(count, feat_dim, tmp_path):
    stack = JBUStack(feat_dim, num_stages=count).eval()
    write(stack.state_dict(), tmp_path / "some.safetensors")
    loaded = load_upsampler(tmp_path / "some.safetensors")
    source, image = torch.randn(1, 6, 2, 3), torch.randn(1, 3, 32, 45)
    with torch.no_grad():
        assert torch.equal(loaded(source, image), stack(source, image))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


@pytest.mark.parametrize(
    "claimed",
    [
        {CLOSING: torch.zeros(())},
        {CLOSING: torch.zeros(10**6, 0)},
        {CLOSING: torch.zeros(10**6, 0, 1, 1)},  # a file of a few bytes; a conv of 4 TB
        {f"up{n}.x": torch.zeros(1) for n in range(1, 300)},
        {"up_blocks.0.weight": torch.zeros(1)},
        {},
    ],
)
def test_a_file_that_claims_too_much_is_refused_before_anything_is_allocated(claimed, tmp_path):
    write(claimed, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="does not fit JBUStack"):
        load_upsampler(tmp_path / "odd.safetensors")
