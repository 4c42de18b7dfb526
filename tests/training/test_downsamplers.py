"""The downsamplers against loops written from their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.training.downsamplers import AttentionDownsampler, SimpleDownsampler


def attention(channels, stride):
    module = AttentionDownsampler(channels, stride).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(("stride", "size"), [(4, (3, 5)), (3, (2, 2)), (1, (4, 4))])
def test_attention_equals_a_loop_over_cells(stride, size):
    module = attention(5, stride)
    x = torch.randn(2, 5, size[0] * stride, size[1] * stride).double()
    expected = torch.zeros(2, 5, *size, dtype=x.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            cell = x[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            saliency = (cell * module.saliency.reshape(1, -1, 1, 1)).sum(1) + module.offset
            logits = module.weight * saliency + module.bias
            weights = logits.flatten(1).softmax(1).reshape(logits.shape)
            expected[:, :, i, j] = (cell * weights[:, None]).sum((2, 3))
    torch.testing.assert_close(module(x, size), expected)


def test_the_simple_one_averages_every_cell_with_one_kernel_that_sums_to_one():
    module, x = SimpleDownsampler(2, 4).double(), torch.randn(2, 2, 12, 20).double()
    module.weight.data.normal_()
    kernel = module.weight.abs() / module.weight.abs().sum()
    expected = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None], stride=4)
    torch.testing.assert_close(module(x, (3, 5)), expected.unflatten(0, (2, 2))[:, :, 0])


def test_gradients_of_the_attention_pass_gradcheck():
    module = attention(2, 3)
    names = [name for name, _ in module.named_parameters()]

    def call(x, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, state, (x, (2, 3)))

    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    x = torch.randn(1, 2, 6, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("kind", [AttentionDownsampler, SimpleDownsampler])
@pytest.mark.parametrize("size", [(3, 5), (7, 2)])
@pytest.mark.parametrize("shape", [(31, 45), (8, 8)])
def test_any_size_comes_from_any_size_and_constants_stay(kind, shape, size):
    out = kind(3, 4)(torch.full((2, 3, *shape), 2.5), size)
    torch.testing.assert_close(out, torch.full((2, 3, *size), 2.5))


def test_cells_lie_where_they_do_in_the_image_at_every_ratio():
    """A linear ramp keeps its value at every cell's centre, also where 37 rows become 9."""
    ramp = ((torch.arange(37) + 0.5) / 37).reshape(1, 1, 37, 1).expand(1, 1, 37, 37)
    module = AttentionDownsampler(1, 4)
    module.saliency.data.zero_()
    centres = (torch.arange(9) + 0.5) / 9
    torch.testing.assert_close(module(ramp, (9, 9))[0, 0, :, 4], centres, atol=1e-2, rtol=0)


def test_projected_features_with_the_saliency_of_the_whole_give_projected_results():
    module = attention(6, 3)
    x, projection = torch.randn(2, 6, 6, 9).double(), torch.randn(4, 6).double()
    project = lambda y: torch.einsum("kc,bchw->bkhw", projection, y)  # noqa: E731
    saliency = torch.einsum("kc,bchw->bkhw", module.saliency, x)
    torch.testing.assert_close(
        module(project(x), (2, 3), saliency=saliency), project(module(x, (2, 3)))
    )
