"""Downsamplers against loops written from their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.training.downsamplers import AttentionDownsampler, SimpleDownsampler


def windows(x, size, stride, kernel):
    """Yields every cell and its window by indexing, borders repeated."""
    low = -((kernel - stride) // 2)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = (torch.arange(kernel) + i * stride + low).clamp(0, x.shape[2] - 1)
            columns = (torch.arange(kernel) + j * stride + low).clamp(0, x.shape[3] - 1)
            yield i, j, x[:, :, rows][:, :, :, columns]


def attention_by_loop(module, x, size):
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for i, j, window in windows(x, size, module.stride, module.kernel):
        saliency = (window * module.saliency.reshape(1, -1, 1, 1)).sum(1) + module.offset
        logits = module.weight * saliency + module.bias
        weights = logits.flatten(1).softmax(1).reshape(logits.shape)
        out[:, :, i, j] = (window * weights[:, None]).sum((2, 3))
    return out


def blur_by_loop(module, x, size):
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    kernel = module.weight.abs() / module.weight.abs().sum()
    for i, j, window in windows(x, size, module.stride, module.kernel):
        out[:, :, i, j] = (window * kernel).sum((2, 3))
    return out


CASES = [
    (4, 4, (3, 5)),
    (3, 3, (2, 2)),
    (4, 6, (3, 2)),
    (2, 5, (4, 3)),
    (3, 9, (2, 3)),
    (1, 3, (4, 4)),
]


def attention(channels, stride, kernel):
    module = AttentionDownsampler(channels, stride, kernel).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def simple(stride, kernel):
    module = SimpleDownsampler(stride, kernel).double()
    with torch.no_grad():
        module.weight.copy_(torch.randn_like(module.weight))
    return module


@pytest.mark.parametrize(("stride", "kernel", "size"), CASES)
def test_attention_equals_a_loop_over_windows(stride, kernel, size):
    module = attention(5, stride, kernel)
    x = torch.randn(2, 5, size[0] * stride, size[1] * stride).double()
    torch.testing.assert_close(module(x, size), attention_by_loop(module, x, size))


@pytest.mark.parametrize(("stride", "kernel", "size"), CASES)
def test_blur_equals_a_loop_over_windows(stride, kernel, size):
    module = simple(stride, kernel)
    x = torch.randn(2, 5, size[0] * stride, size[1] * stride).double()
    torch.testing.assert_close(module(x, size), blur_by_loop(module, x, size))


@pytest.mark.parametrize(("stride", "kernel"), [(3, 3), (2, 3)])
def test_gradients_are_those_of_finite_differences(stride, kernel):
    x = torch.randn(1, 2, 2 * stride, 3 * stride).double().requires_grad_()
    modules = [attention(2, stride, kernel), simple(stride, kernel)]
    for module in modules:
        parameters = [p.detach().requires_grad_() for p in module.parameters()]
        names = [name for name, _ in module.named_parameters()]

        def call(x, *values, module=module, names=names):
            state = dict(zip(names, values, strict=True))
            return torch.func.functional_call(module, state, (x, (2, 3)))

        assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("module", [AttentionDownsampler(3, 4), SimpleDownsampler(4)])
def test_a_new_downsampler_starts_near_the_mean_of_each_cell(module):
    x = torch.randn(1, 3, 12, 20)
    if isinstance(module, AttentionDownsampler):
        module.saliency.data.zero_()
    torch.testing.assert_close(module(x, (3, 5)), F.avg_pool2d(x, 4))


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (7, 2)])
@pytest.mark.parametrize("shape", [(31, 45), (12, 20), (8, 8)])
def test_any_size_comes_from_any_size_and_constants_stay(shape, size):
    constant = torch.full((2, 3, *shape), 2.5)
    for module in (AttentionDownsampler(3, 4, 6), SimpleDownsampler(4, 6)):
        out = module(constant, size)
        assert out.shape == (2, 3, *size)
        torch.testing.assert_close(out, torch.full_like(out, 2.5))


@pytest.mark.parametrize("kernel", [4, 6])
def test_cells_lie_where_they_do_in_the_image_at_every_ratio(kernel):
    """A linear ramp keeps its value at every cell's centre, also where 37 rows become 9."""
    ramp = ((torch.arange(37) + 0.5) / 37).reshape(1, 1, 37, 1).expand(1, 1, 37, 37)
    out = SimpleDownsampler(4, kernel)(ramp, (9, 9))[0, 0, :, 4]
    centres = (torch.arange(9) + 0.5) / 9
    torch.testing.assert_close(out[1:-1], centres[1:-1], atol=1e-4, rtol=0)


def test_patch_14_of_224_pixels_needs_no_resampling(monkeypatch):
    monkeypatch.setattr(F, "interpolate", lambda *_, **__: pytest.fail("resampled"))
    assert AttentionDownsampler(2, 14)(torch.zeros(1, 2, 224, 224), (16, 16)).shape[-1] == 16


def test_projected_features_with_the_saliency_of_the_whole_give_projected_results():
    module = attention(6, 3, 3)
    x, projection = torch.randn(2, 6, 6, 9).double(), torch.randn(4, 6).double()
    project = lambda y: torch.einsum("kc,bchw->bkhw", projection, y)  # noqa: E731
    saliency = torch.einsum("c,bchw->bhw", module.saliency[0], x)[:, None] + module.offset
    torch.testing.assert_close(
        module(project(x), (2, 3), saliency=saliency), project(module(x, (2, 3)))
    )


@pytest.mark.parametrize("training", [True, False])
def test_no_window_is_masked_at_random(training):
    module = attention(3, 4, 4).train(training)
    x = torch.randn(1, 3, 16, 16).double()
    assert torch.equal(module(x, (4, 4)), module(x, (4, 4)))


def test_the_blur_is_non_negative_and_sums_to_one():
    module = simple(3, 5)
    assert (module.blur() >= 0).all()
    assert module.blur().sum().item() == pytest.approx(1)


def test_a_window_smaller_than_a_cell_is_refused():
    with pytest.raises(ValueError, match="every pixel counts; got stride=4, kernel=3"):
        SimpleDownsampler(4, 3)
