from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featup_hub import JBUStack, ModuleBackbone, ShiftAndStitch, TimmBackbone, UpsampledBackbone
from featup_hub.export import trace


def averages(stride: int) -> ModuleBackbone:
    """A backbone whose features are the mean colours of its cells."""
    return ModuleBackbone(nn.AvgPool2d(stride), feat_dim=3, patch_size=stride)


def convolution(stride: int) -> ModuleBackbone:
    return ModuleBackbone(nn.Conv2d(3, 5, stride, stride), feat_dim=5, patch_size=stride)


@pytest.fixture(scope="module")
def vit() -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone("vit_tiny_patch16_224").eval()


@pytest.mark.parametrize("size", [(224, 224), (100, 75)])
def test_one_look_is_the_backbone_bit_by_bit(vit, size):
    image = torch.randn(1, 3, *size)
    assert torch.equal(vit(image), ShiftAndStitch(vit, 1)(image))


@pytest.mark.parametrize(("stride", "per_side"), [(16, 2), (16, 4), (9, 3)])
def test_averages_over_cells_become_the_averages_at_evenly_spaced_places(stride, per_side):
    image = torch.randn(2, 3, 5 * stride, 4 * stride)
    fine = stride // per_side
    edge = (stride - fine) // 2  # so that the first average is centred at half a finer stride
    mirrored = torch.cat([image[..., :edge].flip(3), image, image[..., -edge:].flip(3)], 3)
    rows = [mirrored[:, :, :edge].flip(2), mirrored, mirrored[:, :, -edge:].flip(2)]
    expected = F.avg_pool2d(torch.cat(rows, 2), stride, fine)
    torch.testing.assert_close(ShiftAndStitch(averages(stride), per_side)(image), expected)


def test_an_odd_finer_stride_loses_no_half_pixel():
    rows = torch.arange(56.0).view(1, 1, -1, 1).expand(1, 3, -1, 28)
    places = ShiftAndStitch(averages(14), 2)(rows)[0, 0, 1:-1, 0] + 0.5
    torch.testing.assert_close(places, (torch.arange(1, 7) + 0.5) * 7)


def test_an_image_moved_by_a_finer_stride_moves_the_source_by_a_cell():
    image = torch.randn(1, 3, 64, 96)
    # By cells down and right; by an odd number together, looks that are mirrored would change.
    for mirrored, down, right in ((False, 1, 2), ("alternate", 1, 1), ("alternate", 0, 2)):
        backbone = ShiftAndStitch(convolution(16), 4, mirrored=mirrored)
        moved = backbone(image.roll((4 * down, 4 * right), (2, 3)))
        still = backbone(image)[:, :, 3 : -3 - down, 3 : -3 - right]
        # Cells near the borders see what is mirrored or rolled in there.
        inside = moved[:, :, 3 + down : -3, 3 + right : -3]
        torch.testing.assert_close(inside[..., 1:-1, 1:-1], still[..., 1:-1, 1:-1])


def test_mirrored_looks_turn_with_the_image():
    backbone, image = convolution(16), torch.randn(1, 3, 64, 96)
    mirrored, plain = (ShiftAndStitch(backbone, 2, mirrored=each) for each in (True, False))
    torch.testing.assert_close(mirrored(image.flip(3)), mirrored(image).flip(3))
    expected = (plain(image) + plain(image.flip(3)).flip(3)) / 2
    torch.testing.assert_close(mirrored(image), expected)
    torch.testing.assert_close(ShiftAndStitch(backbone, 2, mirrored=1)(image), expected)
    assert not torch.allclose(plain(image), expected, atol=1e-2)


def test_every_second_look_sees_a_mirrored_image():
    backbone, image = convolution(16), torch.randn(1, 3, 64, 96)
    plain = ShiftAndStitch(backbone, 2, mirrored=False)
    one, turned = plain(image), plain(image.flip(3)).flip(3)
    found = ShiftAndStitch(backbone, 2)(image)
    rows, columns = torch.arange(8)[:, None], torch.arange(12)
    torch.testing.assert_close(found, torch.where((rows + columns) % 2 == 1, turned, one))


@pytest.mark.parametrize("size", [(64, 64), (56, 72), (50, 33), (16, 16), (3, 5)])
def test_the_source_has_one_cell_per_finer_stride_at_any_size(size):
    source = ShiftAndStitch(averages(16), 2)(torch.randn(1, 3, *size))
    assert source.shape[-2:] == tuple(-(-side // 8) for side in size)


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_looks_give_the_same_source_however_many_are_one_batch(at_once):
    backbone, image = convolution(8), torch.randn(2, 3, 40, 24)
    one = ShiftAndStitch(backbone, 2)(image)
    torch.testing.assert_close(ShiftAndStitch(backbone, 2, looks_at_once=at_once)(image), one)


def test_gradients_pass_to_the_image_and_to_the_parameters():
    backbone = ShiftAndStitch(convolution(4), 2).double()
    image = torch.randn(1, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backbone, image)
    backbone(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in backbone.parameters())


def test_a_backbone_with_looks_compiles_and_exports_with_any_size():
    backbone, other = ShiftAndStitch(convolution(4), 2).eval(), torch.randn(2, 3, 24, 16)
    program = trace(backbone, torch.randn(1, 3, 16, 20))
    torch.testing.assert_close(program.module()(other), backbone(other))
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(other), backbone(other))


def test_a_model_with_looks_and_a_joint_stage_is_traced_for_any_size():
    stack = JBUStack(num_stages=2, radius=1, key_dim=2, joint_first=True)
    model = UpsampledBackbone(ShiftAndStitch(convolution(4), 2), stack).eval()
    program = trace(model, torch.randn(1, 3, 16, 24), for_onnx=True)
    other = torch.randn(3, 3, 24, 16)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize(
    ("per_side", "at_once", "message"),
    [
        (3, 1, "looks_per_side must divide the stride of 8 pixels; got 3"),
        (0, 1, "looks_per_side must be at least 1, a whole number; got 0"),
        (1.5, 1, "looks_per_side must be at least 1, a whole number; got 1.5"),
        (2, 0, "looks_at_once must be at least 1, a whole number; got 0"),
    ],
)
def test_looks_that_cannot_be_are_refused(per_side, at_once, message):
    with pytest.raises(ValueError, match=message):
        ShiftAndStitch(averages(8), per_side, looks_at_once=at_once)
    with pytest.raises(ValueError, match="mirrored must be False, True or 'alternate'; got 'every"):
        ShiftAndStitch(averages(8), 2, mirrored="every second")
