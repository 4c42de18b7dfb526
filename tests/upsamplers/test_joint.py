"""The joint bilateral first stage: its formula, its averages, its place in a stack."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from featup_hub import load_upsampler
from featup_hub.ops import jbu_apply, pool_guidance
from featup_hub.upsamplers import JBUStack, JointBilateralStage, stage_sizes
from featup_hub.weights import read, resolve, write
from tests.ops.formulations import randomise


def flat(size: tuple[int, int], radius: int = 3, batch: int = 1) -> Tensor:
    """Kernels of a learned stage that does no more than average."""
    taps = (2 * radius + 1) ** 2
    return torch.full((batch, taps, *size), 1 / taps)


def halves(side: int, border: int) -> Tensor:
    """Black on the left, white from the border on."""
    image = torch.zeros(1, 3, side, side)
    image[..., border:] = 1
    return image


def gaussian(a: Tensor, b: Tensor, bandwidth: float) -> float:
    """Averages the Gaussian kernel over all pairs of colours, (N, G) and (M, G)."""
    return float((-torch.cdist(a, b).square() / (2 * bandwidth**2)).exp().mean())


def unlike(a: Tensor, b: Tensor, bandwidth: float) -> float:
    """Returns the squared distance of two distributions of colours, (N, G) and (M, G)."""
    return gaussian(a, a, bandwidth) + gaussian(b, b, bandwidth) - 2 * gaussian(a, b, bandwidth)


def patches(image: Tensor, rows: int, columns: int) -> Tensor:
    """Cuts an image into cells, (1, 3, H, W) -> (rows, columns, pixels of a cell, 3)."""
    cells = image[0].unflatten(1, (rows, -1)).unflatten(3, (columns, -1))
    return cells.permute(1, 3, 2, 4, 0).flatten(2, 3)


def check(
    kernel: Tensor, places: list[tuple[int, int]], weight: Callable[[int, int, int, int], float]
) -> None:
    """Compares 3×3 kernels at some places, (9, H, W), with weights of each neighbour."""
    for y, x in places:
        weights = [weight(y, x, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        expected = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(kernel[:, y, x], expected, rtol=0.05, atol=5e-3)


def test_embeddings_stand_for_a_gaussian_kernel():
    stage = JointBilateralStage(embedding_dim=4096, bandwidth=0.4)
    colours = torch.rand(1, 3, 1, 40)
    embedded = stage.embed(colours)[0, :, 0].t()
    squares = torch.cdist(colours[0, :, 0].t(), colours[0, :, 0].t()).square()
    expected = (-squares / (2 * 0.4**2)).exp()
    assert (embedded @ embedded.t() - expected).abs().max() < 0.08  # of 4096 samples


def test_smoothing_compares_cells_by_place_and_distribution():
    stage = JointBilateralStage(
        radius=1, embedding_dim=4096, smoothing_spatial=0.9, smoothing_range=0.4, bandwidth=0.5
    )
    image = torch.rand(1, 3, 16, 20)
    kernel = stage.kernels(image, (4, 5), [flat((8, 10), 1)]).smoothing[0]
    cells = patches(image, 4, 5)

    def weight(y, x, dy, dx):
        apart = unlike(cells[y, x], cells[y + dy, x + dx], 0.5)
        return math.exp(-(dy**2 + dx**2) / (2 * 0.9**2) - apart / (2 * 0.4**2))

    check(kernel, [(1, 1), (2, 3)], weight)


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_pass_compares_with_pixels_of_the_one_before_at_distances_in_cells_of_the_source(earlier):
    stage = JointBilateralStage(radius=1, embedding_dim=4096, spatial=0.4, range=0.5, bandwidth=0.5)
    blocks = torch.rand(1, 3, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    image = (blocks + torch.rand(1, 3, 16, 24)) / 2  # both passes' pixels differ
    learned = [flat((4, 6), 1), flat((8, 12), 1)]
    kernel = stage.kernels(image, (2, 3), learned).upsampling[earlier][0]
    rows, columns = kernel.shape[1:]
    pixels, coarser = patches(image, rows, columns), patches(image, rows // 2, columns // 2)

    def weight(y, x, dy, dx):
        row, column = (y + dy) // 2, (x + dx) // 2
        away = ((y + 0.5) / 2 - row - 0.5) ** 2 + ((x + 0.5) / 2 - column - 0.5) ** 2
        apart = unlike(pixels[y, x], coarser[row, column], 0.5)
        return math.exp(-away / 4**earlier / (2 * 0.4**2) - apart / (2 * 0.5**2))

    check(kernel, [(1, 3), (2, 4)], weight)


@pytest.mark.parametrize(
    ("source", "size"), [((1, 1), (2, 2)), ((2, 3), (3, 5)), ((7, 9), (14, 18)), ((4, 4), (4, 7))]
)
def test_constants_stay_at_any_size(source, size):
    stage = JointBilateralStage()
    kernels = stage.kernels(torch.randn(2, 3, 50, 60), source, [flat(size, batch=2)])
    assert all((kernel >= 0).all() for kernel in (kernels.smoothing, *kernels.upsampling))
    for impl in ("torch", "reference"):
        output = stage(torch.ones(2, 5, *source), kernels, impl=impl)
        torch.testing.assert_close(output, torch.ones(2, 5, *size))


def test_pixels_take_the_features_of_cells_that_look_like_them():
    source = (
        (torch.arange(6) > 2).float().expand(1, 1, 6, 6)
    )  # the fourth cell: one, but half black
    stage = JointBilateralStage(share=1.0)
    output = stage(source, stage.kernels(halves(96, 56), (6, 6), [flat((12, 12))]))[0, 0, 6]
    assert output[6] < 0.1  # its black half
    assert output[7] > 0.9  # its white half


@pytest.mark.parametrize(
    ("source_size", "size", "joint_passes"),
    [
        ((3, 4), (48, 64), 1),
        ((2, 3), (64, 90), 2),
        ((1, 2), (64, 128), 3),
        ((5, 5), (9, 10), 1),
        ((4, 4), (32, 32), 1),
    ],
)
def test_a_stack_goes_on_with_the_stages_that_are_left(source_size, size, joint_passes):
    joint = randomise(JBUStack(joint_first=True)).double()
    learned = JBUStack().double().eval()
    assert joint.first is not None
    learned.load_state_dict(
        {k: v for k, v in joint.state_dict().items() if not k.startswith("first.")}
    )
    source, image = torch.randn(2, 5, *source_size).double(), torch.randn(2, 3, *size).double()
    sizes = stage_sizes(source_size, size)
    passed = zip(learned.stages(len(sizes)), sizes, strict=True)
    stages = [stage.kernel(pool_guidance(image, stage_size)) for stage, stage_size in passed]
    first = joint.first.kernels(image, source_size, stages[:joint_passes])
    expected = joint.first(source, first)
    for kernel in stages[joint_passes:]:
        expected = jbu_apply(expected, kernel)
    for impl in ("torch", "reference"):
        torch.testing.assert_close(joint(source, image, impl=impl), expected)
    kernels = joint.kernels(image, source_size)
    torch.testing.assert_close(joint.upsample(source, kernels), expected)
    levels = joint.pyramid(source, kernels)
    assert [level.shape[-2:] for level in levels] == [source_size, *sizes]
    torch.testing.assert_close(levels[-1], expected)


def test_a_source_of_the_images_size_stays_as_it_is():
    alike, image = torch.randn(1, 5, 6, 7), torch.randn(1, 3, 6, 7)
    assert torch.equal(randomise(JBUStack(joint_first=True))(alike, image), alike)


def test_a_stage_without_a_pass_is_refused():
    with pytest.raises(ValueError, match="at least one pass of the learned stage are needed"):
        JointBilateralStage().kernels(torch.rand(1, 3, 16, 16), (2, 2), [])


@pytest.mark.parametrize(("joint", "has"), [(True, "a"), (False, "no")])
def test_kernels_of_a_stack_of_another_kind_are_refused(joint, has):
    image, source = torch.randn(1, 3, 32, 32), torch.randn(1, 5, 4, 4)
    kernels = JBUStack(joint_first=not joint).eval().kernels(image, (4, 4))
    stack = JBUStack(joint_first=joint).eval()
    for use in (stack.upsample, stack.pyramid):
        with pytest.raises(ValueError, match=f"has {has} joint bilateral stage, unlike"):
            use(source, kernels)


def test_widths_of_nothing_repeat_cells():
    stage = JointBilateralStage(smoothing_spatial=0.0, spatial=0.0, range=1e3, share=1.0)
    source = torch.randn(1, 3, 4, 5)
    output = stage(source, stage.kernels(torch.randn(1, 3, 40, 50), (4, 5), [flat((8, 10))]))
    expected = source.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(output, expected)


def test_a_file_tells_that_the_first_stage_is_joint(tmp_path):
    joint = randomise(JBUStack(joint_first=True, num_stages=2))
    write(joint.state_dict(), tmp_path / "mine.safetensors")
    loaded = load_upsampler(tmp_path / "mine.safetensors")
    assert loaded.joint_first
    source, image = torch.randn(1, 5, 4, 4), torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(source, image), joint(source, image))
    joint.save_pretrained(tmp_path / "hub")
    again = JBUStack.from_pretrained(tmp_path / "hub")
    assert torch.equal(again(source, image), loaded(source, image))


@pytest.mark.parametrize(("name", "smooths"), [("jbu_denoise", True), ("jbu_faithful", False)])
def test_shipped_files_keep_constants_and_one_smooths(name, smooths):
    upsampler = load_upsampler(name)
    shipped = read(resolve(name))
    assert all(torch.equal(shipped[k], v) for k, v in upsampler.state_dict().items())
    source, image = torch.randn(1, 5, 6, 8), torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        ones = upsampler(torch.ones_like(source), image)
        kernels = upsampler.kernels(image, (6, 8)).first
        assert kernels is not None
        change = (jbu_apply(source, kernels.smoothing) - source).abs().max()
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-4, atol=1e-4)
    assert (change > 0.1) if smooths else (change < 1e-6)


def test_embeddings_survive_half_precision_and_leave_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stage = JointBilateralStage()
    assert torch.equal(torch.rand(4), expected)
    for dtype in (torch.bfloat16, torch.float16):
        lower = JointBilateralStage().to(dtype)
        assert torch.equal(lower.frequencies.float(), stage.frequencies)
        assert torch.equal(lower.phases.float(), stage.phases)
