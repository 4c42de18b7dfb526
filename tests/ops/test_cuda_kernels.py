"""The fused kernels compute what the definition says; shown on the CPU, see ``emulator``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featup_hub.ops import cuda_apply, cuda_kernel, reference
from featup_hub.ops.reference import StageWeights
from tests.ops.emulator import COMPILER, SOURCES, Barrier, Edit, EmulationError, Emulator

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernels with")

# Largest error over largest value, in float32: some ten roundings of 6e-8 in sums of 49 terms, and
# exponentials that amplify those of their exponents.
TOLERANCE = 2e-6
# What one rounding to the features' type may cost, relative to the value itself.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}

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

Emulate = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture
def emulate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Emulate:
    """Puts an emulator in the device's place; its options may be changed any time."""

    def use(**options: Any) -> None:
        emulator = Emulator(folder, **options)
        for module in (cuda_kernel, cuda_apply):
            monkeypatch.setattr(module, "prepare", emulator.prepare)

    # Few blocks, so that each has several tiles to add up.
    monkeypatch.setattr(cuda_kernel, "MOST_PARTIAL_SUMS", 3)
    # Whatever a kernel does not write stays NaN.
    monkeypatch.setattr(torch.Tensor, "new_empty", _new_nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: x.new_full(x.shape, float("nan")))
    use()
    return use


def _new_nan(tensor: Tensor, *size: int) -> Tensor:
    return tensor.new_full(size, float("nan"))


def error(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Largest error over largest value, NaN being the worst."""
    assert actual.shape == expected.shape
    largest = max(expected.abs().max().item(), scale)
    return (actual.double() - expected).abs().max().nan_to_num(float("inf")).item() / largest


def draw_weights(channels: int = 3, temperature: float = 0.3, sigma: float = 0.8) -> StageWeights:
    """Weights in float64, far from their initial values."""
    draw = partial(torch.randn, dtype=torch.float64)
    return StageWeights(
        range_temp=torch.tensor(temperature).double(),
        sigma_spatial=torch.tensor(sigma).double(),
        range_w0=draw(32, channels) * 0.5,
        range_b0=draw(32) * 0.3,
        range_w1=draw(32, 32) * 0.05,
        range_b1=draw(32) * 0.1,
        fixup_w0=draw(49, 49 + channels) * 0.2,
        fixup_b0=draw(49) * 0.5,
        fixup_w1=draw(49, 49) * 0.2,
        fixup_b1=draw(49) * 0.5,
    )


def single(weights: StageWeights) -> StageWeights:
    return StageWeights(*(tensor.detach().float() for tensor in weights))


def kernel_and_gradients(
    guidance: Tensor, weights: StageWeights
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The kernels with all gradients, of the fused form and of the definition in float64."""
    leaves = [guidance.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
    expected = reference.jbu_kernel(leaves[0], StageWeights(*leaves[1:]))
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, grad)
    kernel = cuda_kernel.kernel(guidance.float(), single(weights))
    grad_guidance, grad_weights = cuda_kernel.kernel_backward(
        grad.float(), guidance.float(), single(weights)
    )
    names = ("kernel", "guidance", *StageWeights._fields)
    return (
        dict(zip(names, (kernel, grad_guidance, *grad_weights), strict=True)),
        dict(zip(names, (expected.detach(), *gradients), strict=True)),
    )


def output_and_gradients(
    source: Tensor, kernel: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The filtered source with its gradients, likewise; features rounded to ``dtype`` before."""
    source = source.to(dtype).double()
    leaves = [source.requires_grad_(), kernel.clone().requires_grad_()]
    expected = reference.jbu_apply(*leaves, bias)
    grad = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    inputs = source.detach().to(dtype), kernel.float()
    output = cuda_apply.apply(*inputs, bias.float())
    fused = cuda_apply.apply_backward(grad, *inputs, True, True)
    names = ("output", "source", "kernel")
    return (
        dict(zip(names, (output, *fused), strict=True)),
        dict(zip(names, (expected.detach(), *gradients), strict=True)),
    )


def draw_maps(
    h: int, w: int, channels: int, batch: int = 1, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A source, kernels of twice its size or of ``size``, and a bias, in float64."""
    draw = partial(torch.randn, dtype=torch.float64)
    return (
        draw(batch, channels, h, w),
        draw(batch, 49, *(size or (2 * h, 2 * w))),
        draw(channels),
    )


def kernel_errors(guidance: Tensor, weights: StageWeights) -> dict[str, float]:
    """Errors of the kernels and of every gradient.

    Gradients of the softmax's parameters are sums over pixels, and over taps, that cancel; all
    six are measured against the largest value among them.
    """
    actual, expected = kernel_and_gradients(guidance, weights)
    softmax = StageWeights._fields[:6]
    scale = max(expected[name].abs().max().item() for name in softmax)
    if guidance.shape[-2:] == (1, 1):  # all taps alike: nothing but rounding is left
        scale = 1.0
    return {
        name: error(actual[name], expected[name], scale if name in softmax else 0.0)
        for name in expected
    }


@pytest.mark.parametrize(("height", "width", "batch"), GUIDANCE_SIZES)
def test_kernels_and_all_their_gradients_match_the_definition(
    emulate: Emulate, height: int, width: int, batch: int
) -> None:
    guidance = torch.randn(batch, 3, height, width, dtype=torch.float64)
    errors = kernel_errors(guidance, draw_weights())
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("channels", [1, 14])
def test_guidance_may_have_any_small_number_of_channels(emulate: Emulate, channels: int) -> None:
    guidance = torch.randn(1, channels, 6, 35, dtype=torch.float64) / channels**0.5
    errors = kernel_errors(guidance, draw_weights(channels))
    assert max(errors.values()) <= TOLERANCE, errors


def test_a_sum_of_almost_nothing_is_clamped_as_the_definition_clamps_it(emulate: Emulate) -> None:
    guidance = torch.randn(1, 3, 6, 9, dtype=torch.float64)
    weights = draw_weights(temperature=2.5, sigma=0.06)
    weights = weights._replace(range_w1=2 * weights.range_w1)
    uncorrected = weights._replace(
        fixup_w1=torch.zeros_like(weights.fixup_w1), fixup_b1=torch.zeros_like(weights.fixup_b1)
    )
    sums = reference.jbu_kernel(guidance, uncorrected).sum(1)
    assert ((sums > 0.01) & (sums < 0.99)).any(), "nothing is clamped here"
    errors = kernel_errors(guidance, weights)
    # Exponents of a hundred are known to 1e-5 in float32, and their exponentials no better.
    assert max(errors.values()) <= 1e-4, errors


def test_a_clamped_temperature_has_no_gradient(emulate: Emulate) -> None:
    guidance = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    actual, expected = kernel_and_gradients(guidance, draw_weights(temperature=-12.0))
    assert expected["range_temp"] == actual["range_temp"] == 0
    assert error(actual["guidance"], expected["guidance"]) <= TOLERANCE


@pytest.mark.parametrize(("h", "w", "channels", "batch"), SOURCE_SIZES)
def test_doubling_and_its_gradients_match_the_definition(
    emulate: Emulate, h: int, w: int, channels: int, batch: int
) -> None:
    actual, expected = output_and_gradients(*draw_maps(h, w, channels, batch))
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(
    ("h", "w", "size"),
    [
        *[(n, m, (n, m)) for n, m in [(1, 1), (2, 1), (3, 5), (9, 19), (16, 4), (5, 34)]],
        *[(4, 4, (7, 7)), (5, 3, (9, 6)), (2, 2, (2, 5))],
    ],
)
def test_other_ratios_and_their_gradients_match_the_definition(
    emulate: Emulate, h: int, w: int, size: tuple[int, int]
) -> None:
    actual, expected = output_and_gradients(*draw_maps(h, w, 6, size=size))
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= TOLERANCE, errors


def test_every_tap_gets_its_gradient(emulate: Emulate) -> None:
    # Upstream's kernel leaves 42 of the 49 without one.
    actual, expected = output_and_gradients(*draw_maps(4, 5, 3))
    taps = actual["kernel"].abs().amax((0, 2, 3))
    assert error(taps, expected["kernel"].abs().amax((0, 2, 3))) <= TOLERANCE
    assert (taps > 0).all()
    guidance = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    actual, _ = kernel_and_gradients(guidance, draw_weights())
    assert (actual["fixup_w1"].abs().amax(1) > 0).all()
    assert (actual["fixup_b1"].abs() > 0).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("h", "w", "channels"), [(5, 9, 34), (3, 4, 132)])
def test_half_precision_features_cost_one_rounding(
    emulate: Emulate, dtype: torch.dtype, h: int, w: int, channels: int
) -> None:
    actual, expected = output_and_gradients(*draw_maps(h, w, channels), dtype)
    for name in ("output", "source"):
        assert actual[name].dtype == dtype
        allowed = ROUNDING[dtype] * expected[name].abs() + TOLERANCE * expected[name].abs().max()
        assert ((actual[name].double() - expected[name]).abs() <= allowed).all()
    assert error(actual["kernel"], expected["kernel"]) <= TOLERANCE


def test_rounding_is_torchs_to_the_last_bit(emulate: Emulate) -> None:
    centre = torch.zeros(1, 49, 1, 1)
    centre[:, 24] = 1
    for dtype in ROUNDING:
        source = torch.cat([torch.randn(500), torch.tensor([60000.0, 1e-7, 1e-39, float("nan")])])
        source = source.to(dtype).view(1, -1, 1, 1)
        bias = torch.cat([torch.randn(500) * 0.01, torch.tensor([9000.0, 1e-9, 1e-39, 0.0])])
        output = cuda_apply.apply(source, centre, bias)
        expected = (source.float() + bias.view(-1, 1, 1)).to(dtype)
        assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))


def everything() -> list[Tensor]:
    """Every kernel's results on one input each, both scales."""
    torch.manual_seed(0)
    guidance = torch.randn(2, 3, 5, 37, dtype=torch.float64)
    actual, _ = kernel_and_gradients(guidance, draw_weights())
    doubled, _ = output_and_gradients(*draw_maps(5, 9, 20))
    same, _ = output_and_gradients(*draw_maps(9, 17, 20, size=(9, 17)))
    return [*actual.values(), *doubled.values(), *same.values()]


def test_results_do_not_depend_on_the_order_of_threads_and_blocks(emulate: Emulate) -> None:
    first = everything()
    for order in (0, 1, 3):
        emulate(order=order)
        assert all(map(torch.equal, first, everything())), order


def test_results_depend_neither_on_alignment_nor_on_how_channels_are_shared_out(
    emulate: Emulate,
) -> None:
    first = everything()
    emulate(offset=1, multiprocessors=1000)
    assert all(map(torch.equal, first, everything()))


def test_any_memory_format_is_taken(emulate: Emulate) -> None:
    source, kernel, bias = (x.float() for x in draw_maps(4, 5, 8))
    first = cuda_apply.apply(source, kernel, bias)
    sliced = torch.stack([source, source], -1)[..., 1]
    for layout in (source.to(memory_format=torch.channels_last), sliced):
        assert torch.equal(cuda_apply.apply(layout, kernel, bias), first)
    assert first.is_contiguous(memory_format=torch.channels_last)


# Faults. A suite that cannot fail proves nothing, least of all that there is no race.


def barriers() -> list[Barrier]:
    return [
        (path.name, line)
        for path in sorted(SOURCES.glob("*.cu*"))
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "__syncthreads();" in text
    ]


def spoiled(emulate: Emulate, **options: Any) -> bool:
    """Whether somebody notices what is wrong with this device."""
    emulate()
    right = everything()
    for order in range(4):
        emulate(order=order, **options)
        try:
            if not all(map(torch.equal, right, everything())):
                return True
        except EmulationError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line"), barriers())
def test_no_barrier_can_be_missing(emulate: Emulate, file: str, line: int) -> None:
    assert spoiled(emulate, barrier=(file, line))


FAULTS: dict[str, Edit] = {
    "a wrong tap": ("jbu_apply.cu", "folded.weight[cell][u][v]", "folded.weight[cell][v][u]"),
    "a tap too far": ("tile.cuh", "centre[p] * near[1 + a + p]", "centre[p] * near[2 + a + p]"),
    "a mirror that repeats the border": ("device.cuh", "2 * (size - 1) - at", "2 * size - 1 - at"),
    "a window one short": ("jbu_apply.cu", "row < SPAN", "row < SPAN - 1"),
    "a border that is not clamped": (
        "cell.cuh",
        "row[clamp(first + i, source_size) - start]",
        "row[min(max(first + i - start, 0), 6)]",
    ),
    "half of the pairs": (
        "jbu_kernel_backward.cu",
        "grad_logits[(TAPS - 1 - t) * plane",
        "grad_logits[t * plane",
    ),
    "a reader forgotten": ("jbu_apply_backward.cu", "i < 2 * (REACH + 1)", "i < 2 * REACH + 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(emulate: Emulate, name: str) -> None:
    assert spoiled(emulate, edit=FAULTS[name])


UNFORGIVABLE: list[tuple[str, str, str]] = [
    ("RANGE_THREADS < pixels)", "RANGE_THREADS <= pixels)", "beyond its ends"),
    ("shared[(tile.group * PX + p) * TAPS", "shared[(tile.group * PX + p) * 60", "behind its end"),
    ("    multiply(sum, tile, fixup_w1", "if (threadIdx.x < 9) __syncthreads();", "barriers"),
]


@pytest.mark.parametrize(("text", "instead", "words"), UNFORGIVABLE)
def test_the_emulator_finds_what_a_device_would_not_forgive(
    emulate: Emulate, text: str, instead: str, words: str
) -> None:
    emulate(edit=("jbu_kernel.cu", text, instead + (text if "barriers" in words else "")))
    with pytest.raises(EmulationError, match=words):
        cuda_kernel.kernel(torch.randn(1, 3, 5, 9), single(draw_weights()))


def test_offsets_go_beyond_two_to_the_31(folder: Path) -> None:
    """Runs the last block of maps that are too large to fill: untouched memory costs nothing."""
    h, channels, size = 3328, 64, 6656
    emulator = Emulator(folder)
    kernels = emulator.prepare(cuda_apply.apply_program(torch.bfloat16), torch.device("cpu"))
    source = torch.empty(h, h, channels, dtype=torch.bfloat16)
    kernel = torch.empty(size, size, 49)
    output = torch.empty(size, size, channels, dtype=torch.bfloat16)
    assert min(kernel.numel(), output.numel()) > 2**31
    corner, below = torch.randn(12, 12, channels).bfloat16(), torch.randn(8, 16, 49)
    source[-12:, -12:], kernel[-8:, -16:] = corner, below
    tiles = (h // 4) * (h // 8)
    arguments = [source, kernel, None, output, h, h, channels, 128]
    kernels.launch_bare("apply_forward_x2", (tiles, 1, 1), arguments, block=(tiles - 1, 0, 0))
    padded = torch.zeros(24, 24, 49)
    padded[-8:, -16:] = below
    expected = reference.jbu_apply(
        corner.permute(2, 0, 1)[None].float(), padded.permute(2, 0, 1)[None]
    )
    torch.testing.assert_close(
        output[-8:, -16:].float(), expected[0].permute(1, 2, 0)[-8:, -16:], rtol=2**-8, atol=1e-5
    )
