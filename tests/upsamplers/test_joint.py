"""The joint bilateral first stage: its formula, what it averages, its way into a stack."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featup_hub import load_upsampler
from featup_hub.ops import jbu_apply, pool_guidance
from featup_hub.upsamplers import JBUStack, JointBilateralStage, JointKernels, stage_sizes
from featup_hub.weights import read, shipped_folder, write
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


def test_smoothing_compares_cells_by_place_mean_and_deviation() -> None:
    stage = JointBilateralStage(1, smoothing_spatial=0.9, smoothing_range=0.4, spread=0.7)
    image = torch.rand(1, 3, 20, 30)
    kernel = stage.kernels(image, (4, 5), flat((8, 10), 1)).smoothing[0]
    patches = image[0].reshape(3, 4, 5, 5, 6).transpose(2, 3).reshape(3, 4, 5, 30)
    mean, deviation = patches.mean(-1), patches.std(-1, correction=0)

    def weight(y: int, x: int, dy: int, dx: int) -> float:
        unlike = (mean[:, y + dy, x + dx] - mean[:, y, x]).square().sum()
        unlike += 0.7**2 * (deviation[:, y + dy, x + dx] - deviation[:, y, x]).square().sum()
        return math.exp(-(dy**2 + dx**2) / (2 * 0.9**2) - float(unlike) / (2 * 0.4**2))

    for y, x in ((1, 1), (2, 3)):
        weights = [weight(y, x, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        expected = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(kernel[:, y, x], expected, rtol=1e-4, atol=1e-5)


def test_upsampling_compares_a_pixel_with_its_neighbours_cells() -> None:
    stage = JointBilateralStage(1, spatial=0.6, range=0.3)
    image = torch.rand(1, 3, 8, 12)
    kernel = stage.kernels(image, (4, 6), flat((8, 12), 1)).upsampling[0]
    cells = image[0].reshape(3, 4, 2, 6, 2).mean((2, 4))

    def weight(y: int, x: int, dy: int, dx: int) -> float:
        row, column = (y + dy) // 2, (x + dx) // 2
        away = ((y + 0.5) / 2 - row - 0.5) ** 2 + ((x + 0.5) / 2 - column - 0.5) ** 2
        unlike = float((image[0, :, y, x] - cells[:, row, column]).square().sum())
        return math.exp(-away / (2 * 0.6**2) - unlike / (2 * 0.3**2))

    for y, x in ((3, 4), (4, 7)):
        weights = [weight(y, x, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        expected = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(kernel[:, y, x], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "size"), [((1, 1), (2, 2)), ((2, 3), (3, 5)), ((7, 9), (14, 18)), ((4, 4), (4, 7))]
)
def test_constants_stay_at_any_size(source: tuple[int, int], size: tuple[int, int]) -> None:
    stage = JointBilateralStage()
    kernels = stage.kernels(torch.randn(2, 3, 50, 60), source, flat(size, batch=2))
    assert all((kernel >= 0).all() for kernel in kernels)
    for impl in ("torch", "reference"):
        output = stage(torch.ones(2, 5, *source), kernels, impl=impl)
        torch.testing.assert_close(output, torch.ones(2, 5, *size))


def test_noise_is_averaged_within_an_object_and_not_across_its_border() -> None:
    stage = JointBilateralStage(smoothing_spatial=1.5)
    kernel = stage.kernels(halves(160, 88), (10, 10), flat((20, 20))).smoothing
    side = (torch.arange(10) > 5).float().expand(1, 1, 10, 10)
    noisy = side + 0.1 * torch.randn(1, 64, 10, 10)
    smoothed = jbu_apply(noisy, kernel)
    columns = [0, 1, 2, 3, 4, 6, 7, 8, 9]  # the sixth holds the border
    error = [(x - side)[..., columns].square().mean().sqrt().item() for x in (noisy, smoothed)]
    assert error[1] < 0.5 * error[0]
    assert smoothed[..., 4].mean().abs() < 0.02
    assert (smoothed[..., 6].mean() - 1).abs() < 0.02


def test_a_cell_that_an_edge_crosses_keeps_to_itself() -> None:
    image = torch.full((1, 3, 48, 48), 0.5)
    image[..., 16:32, 16:24], image[..., 16:32, 24:32] = 0, 1  # the same mean as its neighbours
    own = {}
    for spread in (0.0, 1.0):
        stage = JointBilateralStage(1, spread=spread)
        own[spread] = stage.kernels(image, (3, 3), flat((6, 6), 1)).smoothing[0, 4, 1, 1].item()
    assert own[0.0] < 0.5 < 0.9 < own[1.0]


def test_pixels_take_the_features_of_cells_that_look_like_them() -> None:
    source = (
        (torch.arange(6) > 2).float().expand(1, 1, 6, 6)
    )  # the fourth cell: one, but half black
    stage = JointBilateralStage(share=1.0)
    output = stage(source, stage.kernels(halves(96, 56), (6, 6), flat((12, 12))))[0, 0, 6]
    assert output[6] < 0.1  # its black half
    assert output[7] > 0.9  # its white half


def test_a_stack_goes_on_with_the_stages_that_are_left() -> None:
    joint = randomise(JBUStack(joint_first=True)).double()
    learned = JBUStack().double().eval()
    assert joint.first is not None
    learned.load_state_dict(
        {k: v for k, v in joint.state_dict().items() if not k.startswith("first.")}
    )
    for source_size, size in (((3, 4), (48, 64)), ((2, 3), (64, 90)), ((5, 5), (9, 10))):
        source, image = torch.randn(2, 5, *source_size).double(), torch.randn(2, 3, *size).double()
        between = stage_sizes(source_size, size)[0]
        count = len(stage_sizes(source_size, size))
        own = learned.stages(count)[0].kernel(pool_guidance(image, between))
        doubled = joint.first(source, joint.first.kernels(image, source_size, own))
        expected = learned(doubled, image) if between != size else doubled
        for impl in ("torch", "reference"):
            torch.testing.assert_close(joint(source, image, impl=impl), expected)
        kernels = joint.kernels(image, source_size)
        torch.testing.assert_close(joint.upsample(source, kernels), expected)
        levels = joint.pyramid(source, kernels)
        assert [level.shape[-2:] for level in levels] == [
            source_size,
            *stage_sizes(source_size, size),
        ]
        torch.testing.assert_close(levels[-1], expected)
    alike = torch.randn(1, 5, 6, 7).double()
    assert torch.equal(joint(alike, torch.randn(1, 3, 6, 7).double()), alike)  # nothing to do


def test_kernels_of_a_joint_stage_are_refused_where_there_is_none() -> None:
    image, source = torch.randn(1, 3, 32, 32), torch.randn(1, 5, 4, 4)
    kernels = JBUStack(joint_first=True).eval().kernels(image, (4, 4))
    for use in (JBUStack().eval().upsample, JBUStack().eval().pyramid):
        with pytest.raises(ValueError, match="got kernels of a joint bilateral one"):
            use(source, kernels)


class Applied(nn.Module):
    """The stage as a function of its parameters."""

    def __init__(self, stage: JointBilateralStage, image: Tensor) -> None:
        super().__init__()
        self.stage, self.image = stage, image

    def forward(self, source: Tensor) -> Tensor:
        kernels = self.stage.kernels(self.image, (3, 4), flat((5, 8), 1).double())
        output: Tensor = self.stage(source, kernels)
        return output


def test_gradients_are_right() -> None:
    applied = Applied(JointBilateralStage(1).double(), torch.randn(1, 3, 10, 16).double())
    names = [name for name, _ in applied.named_parameters()]

    def output(source: Tensor, *widths: Tensor) -> Tensor:
        named = dict(zip(names, widths, strict=True))
        result: Tensor = torch.func.functional_call(applied, named, (source,))
        return result

    inputs = [torch.randn(1, 2, 3, 4).double(), *applied.parameters()]
    assert torch.autograd.gradcheck(output, [x.detach().requires_grad_() for x in inputs])


def test_the_share_decides_between_it_and_the_learned_stage() -> None:
    image, source = torch.randn(1, 3, 32, 32), torch.randn(1, 5, 4, 4)
    learned = torch.randn(1, 49, 8, 8)
    outputs = {}
    for share in (0.0, 0.3, 1.0):
        stage = JointBilateralStage(share=share)
        kernels = stage.kernels(image, (4, 4), learned)
        outputs[share] = stage(source, kernels)
    smoothed = jbu_apply(source, kernels.smoothing)
    torch.testing.assert_close(outputs[0.0], jbu_apply(smoothed, learned))
    assert (outputs[1.0] - outputs[0.0]).abs().max() > 0.1
    mixed = 0.3 * outputs[1.0] + 0.7 * outputs[0.0]
    torch.testing.assert_close(outputs[0.3], mixed, rtol=1e-4, atol=1e-5)


def test_widths_of_nothing_repeat_cells() -> None:
    nothing = dict.fromkeys(("smoothing_spatial", "smoothing_range", "spatial"), 0.0)
    stage = JointBilateralStage(**nothing, range=1e3, share=1.0)
    source = torch.randn(1, 3, 4, 5)
    output = stage(source, stage.kernels(torch.randn(1, 3, 40, 50), (4, 5), flat((8, 10))))
    expected = source.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(output, expected)


def test_a_file_tells_that_the_first_stage_is_joint(tmp_path: Path) -> None:
    joint = randomise(JBUStack(joint_first=True, num_stages=2))
    write(joint.state_dict(), tmp_path / "mine.safetensors")
    loaded = load_upsampler(weights=tmp_path / "mine.safetensors")
    assert loaded.joint_first
    source, image = torch.randn(1, 5, 4, 4), torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(source, image), joint(source, image))
    joint.save_pretrained(tmp_path / "hub")
    again = JBUStack.from_pretrained(tmp_path / "hub")
    assert torch.equal(again(source, image), loaded(source, image))


def test_the_shipped_file_is_found_by_its_name_and_keeps_constants() -> None:
    upsampler = load_upsampler(weights="jbu_smooth")
    assert upsampler.joint_first
    assert not load_upsampler().joint_first
    assert not load_upsampler(weights="jbu_universal").joint_first
    shipped = read(shipped_folder() / "jbu_smooth.safetensors")
    assert all(torch.equal(shipped[k], v) for k, v in upsampler.state_dict().items())
    with torch.no_grad():
        ones = upsampler(torch.ones(1, 2, 6, 8), torch.rand(1, 3, 96, 128))
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-4, atol=1e-4)


def test_autocast_leaves_kernels_alone() -> None:
    joint = randomise(JBUStack(joint_first=True))
    image = torch.randn(1, 3, 32, 48)
    kernels = joint.kernels(image, (4, 6)).first
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = joint.kernels(image, (4, 6)).first
    assert isinstance(kernels, JointKernels)
    assert isinstance(under, JointKernels)
    assert all(map(torch.equal, kernels, under))
