"""Lower precision, the meta device, deterministic training."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from featup_hub.image import preprocess, read_image
from featup_hub.loading import load_upsampler
from featup_hub.ops import torch_backend
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD
from featup_hub.upsamplers import JBUStack, JBUStage
from tests.operations import REFUSED, Recorder
from tests.ops.formulations import randomise

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
def test_autocast_leaves_kernels_as_they_are_in_float32(dtype):
    stack = randomise(JBUStack(6, joint_first=True)).eval()
    source, image = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 45, 64)
    with torch.no_grad():
        expected, kernels = stack(source, image), stack.kernels(image, (3, 4))
        with torch.autocast("cpu", dtype=dtype):
            lower, other = stack(source, image), stack.kernels(image, (3, 4))
    first, second = (
        (*k.stages, k.first.smoothing, *k.first.upsampling, *k.first.learned)
        for k in (other, kernels)
    )
    for mine, reference in zip(first, second, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, reference)
    assert 0 < (lower - expected).norm() <= 0.01 * expected.norm()  # the closing convolution


# A tenth above the relative RMS errors that the docstring of JBUStack states.
@pytest.mark.parametrize(("dtype", "stated"), [(torch.bfloat16, 4.4e-3), (torch.float16, 5.5e-4)])
def test_a_converted_module_errs_as_little_as_stated(dtype, stated, root):
    stack = load_upsampler()
    picture = read_image(root / "tests" / "data" / "chelsea.jpg")
    image = preprocess(picture, (224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert image.shape == (1, 3, 224, 224)
    source = torch.randn(1, 16, 14, 14)
    with torch.no_grad():
        expected = stack(source, image)
        lower = copy.deepcopy(stack).to(dtype)(source.to(dtype), image.to(dtype))
    assert lower.dtype == dtype
    assert 0 < (lower.float() - expected).norm() <= stated * expected.norm()


def test_shapes_are_those_of_a_device_without_memory():
    stack = JBUStack(6).eval().to("meta")
    source, image = (torch.empty(shape, device="meta") for shape in ((2, 6, 3, 4), (2, 3, 45, 64)))
    output = stack(source, image)
    assert output.device.type == "meta"
    assert output.shape == (2, 6, 45, 64)
    levels = stack.pyramid(source, stack.kernels(image, (3, 4)))
    assert [level.shape[2] for level in levels] == [3, 6, 12, 23, 45]
    head = nn.Conv2d(6, 5, 1, device="meta")
    assert stack.fold_head(head)(source, image).shape == (2, 5, 45, 64)
    output.sum().backward()
    assert all(p.grad is not None for p in stack.fixup_proj.parameters())


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_training_is_deterministic_where_pytorch_is_told_to_be():
    stack = randomise(JBUStack(6)).train()
    source, image = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 45, 64)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        stack.zero_grad()
        stack(source.requires_grad_(), image).square().sum().backward()
        runs.append([p.grad.clone() for p in stack.parameters() if p.grad is not None])
    assert len(runs[0]) == len(list(stack.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def record(stage: JBUStage, source: Tensor, guidance: Tensor) -> set[str]:
    """Runs the plain PyTorch implementation, forward and backward, and tells what it called."""
    weights = type(stage.weights())(*(w.detach() for w in stage.weights()))
    with Recorder() as recorder:
        kernel = torch_backend.kernel(guidance, weights)
        output = torch_backend.apply(source, kernel, None)
        _, grad = torch_backend.apply_backward(output, source, kernel, True, True)
        torch_backend.kernel_backward(grad, guidance, weights)
    return set(recorder.names)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_no_operation_in_training_is_one_without_a_deterministic_form(size):
    inside = record(JBUStage(), torch.randn(1, 4, 3, 4), torch.randn(1, 3, *size))
    assert {"bmm", "softmax", "_softmax", "addmm"} & inside  # it was seen at work
    assert not inside & REFUSED


def test_the_definition_has_operations_without_a_deterministic_form():
    """Or the test above would see nothing."""
    stack, source = JBUStack(4).train(), torch.randn(1, 4, 3, 4, requires_grad=True)
    with Recorder() as recorder:
        stack(source, torch.randn(1, 3, 45, 64), impl="reference").sum().backward()
    assert {"reflection_pad2d_backward", "upsample_bicubic2d_backward"} <= recorder.names.keys()
