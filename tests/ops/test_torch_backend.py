"""The folded form against the definition: values, gradients, memory."""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from featup_hub.ops import (
    jbu_apply,
    jbu_kernel,
    joint_kernel,
    memory,
    reference,
    torch_backend,
)
from featup_hub.ops.memory import new_map
from featup_hub.ops.reference import StageWeights
from featup_hub.upsamplers import JBUStage
from tests.operations import Recorder
from tests.ops.formulations import randomise


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_filtering_and_its_adjoints_are_the_definitions_at_40_random_sizes_and_ratios(dtype, limit):
    chance = random.Random(0)
    for case in range(40):
        source = chance.randint(1, 50), chance.randint(1, 50)
        ratios = (chance.choice([1, 2, 1.75, 1.99, chance.uniform(1, 4)]) for _ in "yx")
        output = [round(ratio * size) for ratio, size in zip(ratios, source, strict=True)]
        if case == 0:
            source, output = (214, 47), [427, 80]
        exact = (
            dtype == torch.float64
        )  # then also other taps, and a bias, whose gradient may cancel
        taps = [49, 25, 9][case % 3 if exact else 0]
        shapes = ((2, 3, *source), (2, taps, *output), (3,))[: 3 if exact else 2]
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        upstream = torch.randn(2, 3, *output, dtype=dtype)
        results = []
        for impl in ("reference", "torch"):
            filtered = jbu_apply(*inputs, impl=impl)
            results.append((filtered, *torch.autograd.grad(filtered, inputs, upstream)))
        for expected, ours in zip(*results, strict=True):
            assert (ours - expected).abs().max() <= limit * expected.abs().max(), (source, output)


BAD = [float("nan"), float("inf"), float("-inf"), 3e38, 1e-42]


@pytest.mark.parametrize("sizes", [((8, 9), (16, 18)), ((8, 9), (15, 14)), ((9, 9), (9, 9))])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_reaches_what_the_definition_lets_it_reach(bad, sizes):
    source, kernel = torch.randn(1, 2, *sizes[0]), torch.randn(1, 49, *sizes[1])
    source[0, 0, 4, 5] = bad
    for features, kernels in ((source, kernel), (torch.randn_like(source), kernel.clone())):
        if features is not source:
            kernels[0, 20, 7, 3] = bad
        expected, ours = (jbu_apply(features, kernels, impl=i) for i in ("reference", "torch"))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bad", BAD)
def test_guidance_that_is_not_finite_gives_the_definitions_kernels(bad):
    stage, guidance = randomise(JBUStage()), torch.randn(1, 3, 12, 14)
    guidance[0, 1, 5, 6] = bad
    expected, ours = (
        jbu_kernel(guidance, stage.weights(), impl=impl) for impl in ("reference", "torch")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("operation", "shapes", "others"),
    [
        (jbu_apply, [(1, 2, 8, 9), (1, 49, 15, 18)], {}),
        (jbu_kernel, [(1, 3, 12, 14)], {"weights": randomise(JBUStage(3, 4)).weights()}),
        (joint_kernel, [(1, 4, 12, 12), (1, 4, 6, 6)], {"cells": (6, 6), "radius": 3}),
    ],
)
def test_gradients_of_what_is_not_finite_are_the_definitions(operation, shapes, others, bad):
    widths = (torch.tensor(1.0), torch.tensor(0.5)) if operation is joint_kernel else ()
    for spoilt in range(len(shapes) + 1):  # the last is the gradient that arrives
        maps = [torch.randn(shape, requires_grad=True) for shape in shapes]
        upstream = torch.randn_like(operation(*maps, *widths, **others))
        with torch.no_grad():
            [*maps, upstream][spoilt][0, 1, 4, 5] = bad
        expected, ours = (
            torch.autograd.grad(operation(*maps, *widths, **others, impl=impl), maps, upstream)
            for impl in ("reference", "torch")
        )
        for gradient, due in zip(ours, expected, strict=True):
            torch.testing.assert_close(gradient, due, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 3), (4, 7), (20, 9)])
@pytest.mark.parametrize("sigma", [0.8, 0.02])
def test_kernels_and_their_gradients_are_the_definitions(size, sigma):
    stage = randomise(JBUStage(3, 8).double())
    with torch.no_grad():
        stage.sigma_spatial.fill_(sigma)  # the small one clamps the sum in many pixels
    guidance = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 49, *size, dtype=torch.float64)
    results = []
    for impl in ("reference", "torch"):
        weights = stage.weights()
        kernel = jbu_kernel(guidance, weights, impl=impl)
        results.append((kernel, *torch.autograd.grad(kernel, (guidance, *weights), upstream)))
    for ours, expected in zip(results[1], results[0], strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=1e-9)


def test_results_do_not_depend_on_where_bands_end(monkeypatch):
    stage = randomise(JBUStage(3, 8).double())
    guidance = torch.randn(2, 3, 18, 12, dtype=torch.float64)
    source, upstream = torch.randn(2, 6, 9, 6).double(), torch.randn(2, 6, 18, 12).double()

    def run():
        with torch.no_grad():
            weights = StageWeights(*stage.weights())
            kernel = torch_backend.kernel(guidance, weights)
            grad_guidance, gradients = torch_backend.kernel_backward(kernel, guidance, weights)
            return [
                kernel,
                grad_guidance,
                *gradients,
                torch_backend.apply(source, kernel, None),
                *torch_backend.apply_backward(upstream, source, kernel, True, True),
            ]

    whole = run()
    monkeypatch.setattr(memory, "CPU_ELEMENTS", 1)
    for banded, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(banded, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_pass_gradcheck_for_source_guidance_and_every_parameter(impl):
    stage = randomise(JBUStage(3, 4, 1).double())
    names = [name for name, _ in stage.named_parameters()]
    source = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)

    def upsample(source, guidance, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(stage, parameters, (source, guidance), {"impl": impl})

    assert torch.autograd.gradcheck(upsample, (source, guidance, *stage.parameters()))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_every_one_of_49_taps_receives_a_gradient(impl):
    source = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    kernel = torch.randn(1, 49, 12, 12, dtype=torch.float64, requires_grad=True)
    jbu_apply(source, kernel, impl=impl).square().sum().backward()
    assert kernel.grad.abs().sum((0, 2, 3)).all()


def test_nothing_larger_than_kernels_or_output_is_made_in_training_either():
    stage, channels = randomise(JBUStage()), 64
    source = torch.randn(1, channels, 48, 48, requires_grad=True)
    guidance = torch.randn(1, 3, 96, 96)
    with Recorder() as recorder:
        weights = StageWeights(*(w.detach() for w in stage.weights()))
        kernel = torch_backend.kernel(guidance, weights)
        output = torch_backend.apply(source.detach(), kernel, None)
        torch_backend.apply_backward(output, source.detach(), kernel, True, True)
        torch_backend.kernel_backward(kernel, guidance, weights)
    unfolded_keys = 32 * 49 * 96 * 96
    elements = recorder.largest // 4
    assert elements <= 1.2 * max(
        output.numel(), kernel.numel(), memory.temporary_elements(source.device)
    )
    assert elements < unfolded_keys / 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_filtered_in_float32(dtype):
    source, kernel = torch.randn(1, 8, 6, 6).to(dtype), torch.randn(1, 49, 12, 12)
    expected = reference.jbu_apply(source.float(), kernel).to(dtype)
    for impl in ("torch", "reference"):
        filtered = jbu_apply(source, kernel, impl=impl)
        assert filtered.dtype == dtype
        torch.testing.assert_close(filtered, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for huge pages")
def test_huge_pages_are_asked_for_within_a_large_map_and_only_there(monkeypatch):
    asked: list[tuple[int, int, int]] = []

    def madvise(start, length, advice):
        asked.append((start.value or 0, length.value, advice))
        return -1  # as where they are disabled

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    like = torch.zeros(1, dtype=torch.float16)
    assert new_map(like, 3, 5).shape == (3, 5)
    assert asked == []
    large = new_map(like, 3, 1 << 20)
    assert (large.shape, large.dtype) == ((3, 1 << 20), torch.float16)
    ((start, length, advice),) = asked
    assert (start % mmap.PAGESIZE, advice) == (0, mmap.MADV_HUGEPAGE)
    assert 0 <= start - large.data_ptr() < mmap.PAGESIZE
    assert start + length == large.data_ptr() + large.nbytes
