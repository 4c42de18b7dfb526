"""The fused kernels equal the definition, on the CPU, see ``emulator``."""

from __future__ import annotations

import pytest
import torch

from featup_hub.ops import reference
from featup_hub.ops.cuda import backend
from featup_hub.ops.cuda.programs import UnavailableError
from tests.ops.cuda.emulator import COMPILER, Emulator
from tests.ops.cuda.fused_results import (
    ARCHITECTURES,
    TENSOR_TOLERANCE,
    TOLERANCE,
    draw_maps,
    draw_weights,
    error,
    everything,
    far_sample,
    halves,
    joint_pair,
    kernel_pair,
    output_and_gradients,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernels with")

# Relative error of one rounding to the features' type.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

PRECISION = list(zip(ARCHITECTURES, (TENSOR_TOLERANCE, TOLERANCE), strict=True))
# Height, width and batch of guidance: one pixel, fewer than the mirror's reach, one and several
# tiles (4 or 2 rows of 32), each with a rest.
GUIDANCE_SIZES = [
    (1, 1, 1), (1, 2, 1), (2, 3, 1), (3, 3, 2), (4, 7, 1), (7, 8, 1), (13, 5, 1), (5, 32, 1),
    (6, 33, 2), (1, 70, 1), (9, 64, 1), (70, 2, 1), (11, 37, 1),
]  # fmt: skip
# Height, width, channels and batch of a source: tiles are 4x8 cells, warps take 128 channels.
SOURCE_SIZES = [
    (1, 1, 1, 1), (1, 2, 3, 2), (2, 3, 5, 1), (3, 1, 4, 1), (2, 2, 131, 1), (4, 8, 7, 1),
    (5, 9, 34, 2), (8, 4, 32, 1), (3, 17, 36, 1), (4, 9, 128, 1), (9, 3, 260, 1), (7, 7, 2, 1),
    (6, 10, 16, 1), (13, 1, 6, 1),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "tolerance"), PRECISION)
@pytest.mark.parametrize(("height", "width", "batch"), GUIDANCE_SIZES)
def test_kernels_match_the_definition(emulate, height, width, batch, architecture, tolerance):
    emulate(architecture=architecture)
    guidance = torch.randn(batch, 3, height, width, dtype=torch.float64)
    assert error(*kernel_pair(guidance, draw_weights())) <= tolerance


# Tensor cores take 49 taps and the channels in eights: 50 to 56 of them in seven steps, 57 to 63 in
# eight. Without them, channels are a loop.
@pytest.mark.parametrize(
    ("channels", "architecture", "tolerance"),
    [
        *[(channels, *PRECISION[0]) for channels in (1, 7, 8, 14)],
        *[(channels, *PRECISION[1]) for channels in (1, 14)],
    ],
)
def test_guidance_may_have_any_small_number_of_channels(emulate, channels, architecture, tolerance):
    emulate(architecture=architecture)
    guidance = torch.randn(1, channels, 6, 35, dtype=torch.float64) / channels**0.5
    assert error(*kernel_pair(guidance, draw_weights(channels))) <= tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_are_infinite_or_no_number_where_the_definition_is(emulate, architecture):
    emulate(architecture=architecture)
    guidance = torch.randn(1, 3, 9, 40, dtype=torch.float64)
    guidance[0, 1, 4, 30] = float("nan")
    weights = draw_weights()
    weights.fixup_w1[7, 3], weights.fixup_b1[9] = float("inf"), float("-inf")
    actual, expected = kernel_pair(guidance, weights)
    assert expected[:, [7, 9]].isinf().any((0, 2, 3)).all()
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_sum_of_almost_nothing_is_clamped_as_the_definition_clamps_it(emulate):
    guidance = torch.randn(1, 3, 6, 9, dtype=torch.float64)
    weights = draw_weights(temperature=2.5, sigma=0.06)
    weights = weights._replace(range_w1=2 * weights.range_w1)
    uncorrected = weights._replace(
        fixup_w1=torch.zeros_like(weights.fixup_w1), fixup_b1=torch.zeros_like(weights.fixup_b1)
    )
    sums = reference.jbu_kernel(guidance, uncorrected).sum(1)
    assert ((sums > 0.01) & (sums < 0.99)).any(), "nothing is clamped here"
    # Exponents of a hundred are known to 1e-5 in float32, and their exponentials no better.
    assert error(*kernel_pair(guidance, weights)) <= 1e-4


# Output, cells, source and batch: the smoothing, doublings with a rest, the second pass, one pixel.
@pytest.mark.parametrize(
    ("size", "cells", "source", "batch"),
    [
        ((5, 9), (5, 9), (5, 9), 2),
        ((7, 18), (4, 9), (4, 9), 1),
        ((13, 36), (7, 18), (4, 9), 1),
        ((1, 1), (1, 1), (1, 1), 1),
        ((2, 1), (1, 1), (1, 1), 3),
    ],
)
def test_joint_kernels_match_the_definition(emulate, size, cells, source, batch):
    joint, expected = joint_pair(size, cells, source, batch)
    # Exponents are differences of larger numbers.
    assert error(joint, expected) <= 3 * TOLERANCE


def test_joint_kernels_in_a_captured_graph_cache_nothing(emulate, monkeypatch):
    # What a capture records is computed only when the graph is replayed.
    backend._joint_axis.cache_clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert error(*joint_pair((7, 18), (4, 9), (4, 9))) <= 3 * TOLERANCE
    assert backend._joint_axis.cache_info().currsize == 0


def test_joint_kernels_of_another_radius_are_refused(emulate):
    maps, width = torch.zeros(1, 2, 4, 4), torch.ones(())
    with pytest.raises(UnavailableError, match=r"radius of 3; got 2; use impl='torch'"):
        backend.joint_kernel(maps, maps, width, width, (4, 4), 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("h", "w", "channels", "batch"), SOURCE_SIZES)
def test_doubling_and_its_gradients_match_the_definition(
    emulate, h, w, channels, batch, architecture
):
    emulate(architecture=architecture)
    actual, expected = output_and_gradients(*draw_maps(h, w, channels, batch))
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(
    ("h", "w", "size"),
    [
        *[(n, m, (n, m)) for n, m in [(1, 1), (2, 1), (3, 5), (9, 19), (16, 4), (5, 34)]],
        *[(4, 4, (7, 7)), (5, 3, (9, 6)), (8, 20, (14, 35)), (1, 2, (2, 3)), (9, 18, (17, 18))],
        *[(n, m, (2 * n - 1, 2 * m - 1)) for n, m in [(2, 3), (4, 10), (11, 33)]],
        (2, 2, (2, 5)),
    ],
)
def test_other_ratios_and_their_gradients_match_the_definition(emulate, h, w, size):
    actual, expected = output_and_gradients(*draw_maps(h, w, 6, size=size))
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= TOLERANCE, errors


def test_every_tap_gets_its_gradient(emulate):
    # Upstream's kernel leaves 42 of the 49 without one.
    actual, expected = output_and_gradients(*draw_maps(4, 5, 3))
    taps = actual["kernel"].abs().amax((0, 2, 3))
    assert error(taps, expected["kernel"].abs().amax((0, 2, 3))) <= TOLERANCE
    assert (taps > 0).all()


# On tensor cores where the device, sm_80 or newer, has any.
HALF_SIZES = [
    (1, 1, 8, 2), (2, 3, 16, 1), (5, 9, 34, 1), (3, 4, 132, 1), (4, 8, 64, 1), (3, 17, 136, 1),
    (9, 5, 24, 2), (7, 7, 40, 1),
]  # fmt: skip


@pytest.mark.parametrize("architecture", [75, 90])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", HALF_SIZES, ids=str)
def test_half_precision_features_cost_one_rounding(emulate, size, dtype, architecture):
    emulate(architecture=architecture)
    actual, expected = output_and_gradients(*draw_maps(*size), dtype)
    for name in ("output", "source"):
        assert actual[name].dtype == dtype
        allowed = ROUNDING[dtype] * expected[name].abs() + TOLERANCE * expected[name].abs().max()
        assert ((actual[name].double() - expected[name]).abs() <= allowed).all()
    assert error(actual["kernel"], expected["kernel"]) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDING])
def test_what_is_not_finite_reaches_the_pixels_that_read_it_and_no_others(emulate, dtype):
    source, kernel, bias = draw_maps(9, 17, 40)
    source[0, 5, 4, 8], source[0, 17, 0, 0], source[0, 33, 8, 3] = (
        float("inf"), float("nan"), float("-inf"),
    )  # fmt: skip
    output = backend.apply(source.to(dtype), kernel.float(), bias.float())
    expected = reference.jbu_apply(source.to(dtype).double(), kernel, bias)
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert output[0, 5].isinf().any(), "infinity has become something else"


def test_what_is_not_finite_changes_nothing_in_other_channels(emulate):
    source, kernel, _ = (x.float() for x in draw_maps(5, 9, 260))
    first = backend.apply(source, kernel, None)
    source[0, 130, 2, 3] = float("inf")
    for multiprocessors in (2, 1000):  # one block for all channels, or three
        emulate(multiprocessors=multiprocessors)
        second = backend.apply(source, kernel, None)
        assert not second[:, 130].isfinite().all()
        assert torch.equal(second[:, :128], first[:, :128])
        assert torch.equal(second[:, 256:], first[:, 256:])


def test_weights_beyond_the_range_of_float16_are_taken(emulate):
    source, kernel, _ = draw_maps(5, 9, 16)
    source, kernel = (1e-4 * source).half(), (1e5 * kernel).float()
    expected = reference.jbu_apply(source.double(), kernel.double())
    found = backend.apply(source, kernel, None)
    assert error(found, expected) <= 2**-11


def test_rounding_is_torchs_to_the_last_bit(emulate):
    centre = torch.zeros(1, 49, 1, 1)
    centre[:, 24] = 1
    for dtype in ROUNDING:
        source = torch.cat([torch.randn(500), torch.tensor([60000.0, 1e-7, 1e-39, float("nan")])])
        source = source.to(dtype).view(1, -1, 1, 1)
        bias = torch.cat([torch.randn(500) * 0.01, torch.tensor([9000.0, 1e-9, 1e-39, 0.0])])
        output = backend.apply(source, centre, bias)
        expected = (source.float() + bias.view(-1, 1, 1)).to(dtype)
        assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_results_do_not_depend_on_the_order_of_threads_and_blocks(emulate):
    first = [*everything(), *halves()]
    for order in (0, 1, 3):
        emulate(order=order)
        assert all(map(torch.equal, first, [*everything(), *halves()])), order


def test_results_depend_neither_on_alignment_nor_on_how_channels_are_shared_out(emulate):
    first = [*everything(), *halves()]
    emulate(offset=1, multiprocessors=1000)
    assert all(map(torch.equal, first, [*everything(), *halves()]))


def test_a_batch_may_hold_more_than_two_to_the_31_numbers(folder):
    kernel, filtered = far_sample(Emulator(folder))
    assert kernel <= TENSOR_TOLERANCE
    assert filtered <= TOLERANCE


def test_offsets_go_beyond_two_to_the_31(folder):
    """Runs the last block of maps that are too large to fill: untouched memory costs nothing."""
    h, channels, size = 3328, 64, 6656
    emulator = Emulator(folder)
    kernels = emulator.prepare(backend.apply_program(torch.bfloat16), torch.device("cpu"))
    source = torch.empty(h, h, channels, dtype=torch.bfloat16)
    kernel = torch.empty(size, size, 49)
    output = torch.empty(size, size, channels, dtype=torch.bfloat16)
    assert min(kernel.numel(), output.numel()) > 2**31
    corner, below = torch.randn(12, 12, channels).bfloat16(), torch.randn(8, 16, 49)
    source[-12:, -12:], kernel[-8:, -16:] = corner, below
    tiles = (h // 4) * (h // 8)
    arguments = [source, kernel, None, output, h, h, size, size, channels, 128]
    kernels.launch_bare("apply_forward_7", (tiles, 1, 1), arguments, block=(tiles - 1, 0, 0))
    padded = torch.zeros(24, 24, 49)
    padded[-8:, -16:] = below
    expected = reference.jbu_apply(
        corner.permute(2, 0, 1)[None].float(), padded.permute(2, 0, 1)[None]
    )
    # Tensor cores see 16 bits of each of the 49 weights, which counts where a sum cancels.
    torch.testing.assert_close(
        output[-8:, -16:].float(),
        expected[0].permute(1, 2, 0)[-8:, -16:],
        rtol=2**-8,
        atol=49 * 2**-17,
    )
