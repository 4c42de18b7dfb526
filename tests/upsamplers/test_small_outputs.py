"""Outputs of at most half the image's size: one stage more, averaged down."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from featup_hub.upsamplers import JBUStack
from featup_hub.upsamplers.plan import halved
from featup_hub.upsamplers.tiled import upsample_tiled
from tests.operations import Recorder
from tests.ops.formulations import randomise

SMALL = [
    *(((3, 4), (24, 32), 3), ((5, 4), (23, 31), 3), ((5, 4), (5, 31), 3), ((2, 2), (2, 3), 3)),
    *(((3, 4), (22, 31), radius) for radius in (0, 1, 2, 4)),
]


@pytest.mark.parametrize(("cells", "size", "radius"), SMALL)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@torch.no_grad()
def test_a_small_output_is_that_of_twice_its_size_averaged_down(cells, size, radius, impl):
    stack = randomise(JBUStack(6, joint_first=True, radius=radius)).eval()
    source = torch.randn(2, 6, *cells)
    image = torch.randn(2, 3, 2 * size[0] + 1, 2 * size[1])
    double = stack(source, image, size=(2 * size[0], 2 * size[1]), impl="reference")
    expected = F.avg_pool2d(double, 2)

    kernels = stack.kernels(image, cells, size=size, impl=impl)
    for small in (
        stack(source, image, size=size, impl=impl),
        stack.upsample(source, kernels, impl=impl),
        stack.pyramid(source, kernels, impl=impl)[-1],
        upsample_tiled(stack, source, image, size=size, max_bytes=6_000_000, impl=impl),
    ):
        # Rounding depends on the number of threads, and small values are sums of large ones.
        assert (small - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_small_output_can_be_traced():
    stack = randomise(JBUStack(joint_first=True)).eval().requires_grad_(False)
    inputs = torch.randn(1, 5, 3, 4), torch.randn(1, 3, 48, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about sizes that become constants
        traced = torch.jit.trace(lambda *maps: stack(*maps, size=(24, 32)), inputs)
    torch.testing.assert_close(traced(*inputs), stack(*inputs, size=(24, 32)))


def test_stages_of_featup_keep_featups_small_outputs():
    stack, source = JBUStack().eval(), torch.randn(1, 5, 3, 4)
    image = torch.randn(1, 3, 48, 64)
    small = F.adaptive_avg_pool2d(image, (24, 32))
    torch.testing.assert_close(stack(source, image, size=(24, 32)), stack(source, small))


def test_kernels_are_halved_without_float64_which_not_every_device_has():
    with Recorder() as recorder:
        halved(torch.rand(1, 49, 6, 8))
    assert torch.float64 not in recorder.dtypes
