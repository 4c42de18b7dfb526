"""Linear heads applied at low resolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from featup_hub.upsamplers import JBUStack
from tests.ops.formulations import randomise


@pytest.mark.parametrize("feat_dim", [None, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [None, (3, 4)])
@pytest.mark.parametrize("joint_first", [False, True])
def test_a_folded_head_is_the_head_behind_the_upsampler(feat_dim, bias, size, joint_first):
    stack = randomise(JBUStack(feat_dim, joint_first=joint_first).double())
    head = nn.Conv2d(6, 3, 1, bias=bias).double()
    source, image = torch.randn(2, 6, 3, 4).double(), torch.randn(2, 3, 11, 16).double()
    expected = head(stack(source, image, size=size))
    logits = stack.fold_head(head)(source, image, size=size)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    parameters = [*stack.parameters(), *head.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    ours = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    for gradient, reference in zip(ours, wanted, strict=True):
        if reference is not None and reference.any():
            torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-8)


class Tripled(nn.Linear):
    """Does more than its weight and bias say."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize(
    "head",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Sequential(nn.Linear(4, 4)),
        nn.ConvTranspose2d(4, 4, 1),
        Tripled(4, 4),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5),
    ],
)
def test_only_a_linear_head_can_be_folded(head):
    todo = r"(?s)only a linear head commutes.*; (put it behind the upsampler|normalise or prune)"
    with pytest.raises(ValueError, match=todo):
        JBUStack().fold_head(head)


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(4, 3),
        nn.Conv2d(4, 3, 1, padding="same"),
        nn.Conv2d(4, 3, 1, padding="valid"),
        parametrizations.weight_norm(nn.Linear(4, 3)),
    ],
)
def test_linear_layers_and_heads_without_padding_are_folded(head):
    stack, source, image = JBUStack().eval(), torch.randn(1, 4, 2, 2), torch.randn(1, 3, 32, 32)
    weight, bias = head.weight.flatten(1)[:, :, None, None], head.bias
    expected = F.conv2d(stack(source, image), weight, bias)
    for impl in ("auto", "reference"):
        torch.testing.assert_close(stack.fold_head(head)(source, image, impl=impl), expected)


def test_features_and_heads_of_other_channels_are_refused():
    source, image = torch.randn(1, 8, 2, 2), torch.randn(1, 3, 32, 32)
    head, message = nn.Linear(4, 3), "features of 8 channels is needed; got one that takes 4"
    with pytest.raises(ValueError, match=message):
        JBUStack(8).fold_head(head)
    with pytest.raises(ValueError, match=message):
        JBUStack().eval().fold_head(head)(source, image)
    with pytest.raises(ValueError, match="made for 5 channels; got 8"):
        JBUStack(5)(source, image)
