"""The stack: upstream's numbers, any size, and refusals."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from featup_hub.ops import jbu_apply, jbu_kernel
from featup_hub.upsamplers import JBUStack, JBUStage, stage_sizes
from featup_hub.weights import convert_upstream
from tests.ops.formulations import randomise, stack_forward

CHECKPOINTS = {
    "featup_clip_jbu_stack_cocostuff.ckpt": 512,
    "featup_maskclip_jbu_stack_cocostuff.ckpt": 512,
    "sam_no_norm.ckpt": 256,
    "sam_yes_norm.ckpt": 256,
}
# Batch, height, width of a source; pixels of the image per cell.
SHAPES = [
    (*shape, scale)
    for shape in [(1, 1, 1), (3, 1, 3), (1, 3, 2), (2, 5, 3)]
    for scale in [(16, 16), (8, 20), (33, 40)]
]


def doubled(h: int, w: int) -> list[tuple[int, int]]:
    return [(h * 2**k, w * 2**k) for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(("batch", "height", "width", "scale"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_stack_is_the_unfold_formulation(batch, height, width, scale, dtype, tolerance):
    stack = randomise(JBUStack(5).to(dtype))
    source = torch.randn(batch, 5, height, width, dtype=dtype)
    image = torch.randn(batch, 3, scale[0] * height, scale[1] * width, dtype=dtype)
    size = (16 * height, 16 * width)
    with torch.no_grad():
        expected = stack_forward(stack, source, image, doubled(height, width))
        bound = tolerance * expected.abs().max()
        for impl in ("torch", "reference"):
            upsampled = stack(source, image, size=size, impl=impl)
            assert (upsampled - expected).abs().max() <= bound
        last = {"memory_format": torch.channels_last}
        sliced = source.repeat(1, 2, 1, 1)[:, 5:], image.repeat(1, 1, 1, 2)[..., : image.shape[3]]
        layouts = ((source.contiguous(**last), image), (source, image.contiguous(**last)), sliced)
        for other_source, other_image in layouts:
            upsampled = stack(other_source, other_image, size=size, impl="torch")
            assert (upsampled - expected).abs().max() <= bound


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_load_strictly_and_give_upstreams_numbers(shared, name):
    channels = CHECKPOINTS[name]
    stack = JBUStack(channels).eval()
    checkpoint = convert_upstream(shared / "checkpoints" / name)
    stack.load_state_dict(checkpoint.upsampler, strict=True)
    assert (len(checkpoint.upsampler), checkpoint.feat_dim) == (42, channels)
    assert (checkpoint.norm is not None) == (name == "sam_yes_norm.ckpt")
    source, image = torch.randn(1, channels, 1, 2), torch.randn(1, 3, 17, 30)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        module, inputs = stack.to(dtype), (source.to(dtype), image.to(dtype))
        with torch.no_grad():
            expected = stack_forward(module, *inputs, doubled(1, 2))
            upsampled = module(*inputs, size=(16, 32))
        assert (upsampled - expected).abs().max() <= tolerance * expected.abs().max()


def test_stages_alone_have_upstreams_number_of_parameters():
    assert sum(p.numel() for p in JBUStack().parameters()) == 24_932
    assert len(JBUStack(7).state_dict()) == 42


@pytest.mark.parametrize(
    ("source", "output", "expected"),
    [
        ((7, 7), (224, 224), [(14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]),
        ((4, 4), (9, 4), [(5, 4), (9, 4)]),
        ((5, 7), (5, 7), []),
        ((1, 1), (3, 1), [(2, 1), (3, 1)]),
        ((30, 30), (31, 60), [(31, 60)]),
    ],
)
def test_stages_are_planned_backwards_from_the_output(source, output, expected):
    assert stage_sizes(source, output) == expected


def test_a_plan_never_shrinks_and_no_stage_more_than_doubles():
    for h in range(1, 9):
        for height in range(h, 70):
            sizes = [(h, 1), *stage_sizes((h, 1), (height, 1))]
            assert sizes[-1] == (height, 1)
            for (before, _), (after, _) in itertools.pairwise(sizes):
                assert before <= after <= 2 * before


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_the_last_stages_are_used_and_the_first_repeats(count):
    stack = JBUStack()
    names = {id(getattr(stack, f"up{i}")): i for i in (1, 2, 3, 4)}
    used = [names[id(stage)] for stage in stack.stages(count)]
    assert used == {1: [4], 2: [3, 4], 4: [1, 2, 3, 4], 6: [1, 1, 1, 2, 3, 4]}[count]


@pytest.mark.parametrize("joint_first", [False, True])
def test_samples_of_a_batch_do_not_see_each_other(joint_first):
    stack = randomise(JBUStack(4, joint_first=joint_first)).double()
    source, image = torch.randn(3, 4, 3, 5).double(), torch.randn(3, 3, 48, 80).double()
    with torch.no_grad():
        together = stack(source, image)
        alone = torch.cat([stack(source[i : i + 1], image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_features_can_be_changed_in_place_before_the_backward_pass(impl):
    stack, image = JBUStack().eval(), torch.randn(1, 3, 16, 24)
    source = torch.randn(1, 5, 4, 6, requires_grad=True)
    features = stack(source, image, impl=impl)
    (expected,) = torch.autograd.grad((features + 1).relu().square().sum(), source)
    features = stack(source, image, impl=impl)
    features += 1
    (found,) = torch.autograd.grad(features.relu_().square().sum(), source)
    torch.testing.assert_close(found, expected)
    kernel = jbu_kernel(image, stack.stages(1)[0].weights(), impl=impl)
    kernel *= 2
    kernel.sum().backward()


def test_kernels_computed_once_serve_many_feature_maps():
    stack = randomise(JBUStack())
    image = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        kernels = stack.kernels(image, (4, 3))
        for channels in (1, 5, 9):
            source = torch.randn(1, channels, 4, 3)
            assert torch.equal(stack.upsample(source, kernels), stack(source, image))
    with pytest.raises(ValueError, match=r"for features of size \(4, 3\); got \(3, 3\)"):
        stack.upsample(torch.randn(1, 2, 3, 3), kernels)


@pytest.mark.parametrize("feat_dim", [None, 5])
def test_a_pyramid_holds_what_each_stage_makes(feat_dim):
    stack = randomise(JBUStack(feat_dim))
    source, image = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        kernels = stack.kernels(image, (3, 4))
        levels = stack.pyramid(source, kernels)
        assert [level.shape[-1] for level in levels] == [4, 8, 16, 32, 64]
        assert torch.equal(levels[0], source) == (feat_dim is None)
        for low, high, kernel in zip(levels, levels[1:], kernels.stages, strict=False):
            bias = 0.0 if feat_dim is None else 0.1 * stack.fixup_proj[1].bias[:, None, None]
            expected = jbu_apply(low - bias, kernel) + bias
            torch.testing.assert_close(high, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(levels[-1], stack(source, image), rtol=1e-5, atol=1e-5)


SOURCE, IMAGE = torch.ones(1, 4, 2, 2), torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("source", "guidance", "error", "message"),
    [
        (SOURCE, IMAGE.byte(), TypeError, "guidance must be floating-point.*uint8; divide"),
        (SOURCE, "photo.jpg", TypeError, "guidance must be a tensor; got str; model.preprocess"),
        (SOURCE[:0], IMAGE[:0, :, :4, :4], ValueError, r"at least one image; got \(0, 3, 4, 4\)"),
        (SOURCE[:, :, :0], IMAGE, ValueError, r"must be features, .*; got \(1, 4, 0, 2\)"),
        (SOURCE[:, :, :, :0], IMAGE, ValueError, r"must be features, .*; got \(1, 4, 2, 0\)"),
        (SOURCE[:, :0], IMAGE, ValueError, r"must be features, .*; got \(1, 0, 2, 2\)"),
        (SOURCE.flatten(2), IMAGE, ValueError, r"\(1, 4, 4\)\? .*unflatten\(2, \(h, w"),
        (IMAGE, SOURCE, ValueError, "were source and guidance swapped"),
        (SOURCE, IMAGE.repeat(2, 1, 1, 1), ValueError, r"batch size 2; got \(1, 4, 2, 2\)"),
    ],
)
def test_what_is_not_features_and_their_image_is_refused_with_what_to_do(
    source, guidance, error, message
):
    with pytest.raises(error, match=message):
        JBUStack().eval()(source, guidance)


def test_wrong_sizes_and_kernels_are_refused():
    stack = JBUStack().eval()
    for size in ("32", 32.0, (32,), (32, 32, 1), ("32", "32"), (None, 32)):
        with pytest.raises(TypeError, match=r"size must be a number of pixels, or .*; got "):
            stack(SOURCE, IMAGE, size=size)
    for size in (2, (2.0, 2.0), (2, 2, 2)):
        with pytest.raises(TypeError, match=r"source_size must be \(height, width\), whole num"):
            stack.kernels(IMAGE, size)
    with pytest.raises(ValueError, match="at least one row and one column; got 0×2"):
        stack.kernels(IMAGE, (0, 2))
    with pytest.raises(TypeError, match=r"guidance must be floating-point.*uint8; divide"):
        stack.kernels(IMAGE.byte(), (2, 2))
    for method in (stack.upsample, stack.pyramid):
        with pytest.raises(TypeError, match=r"kernels must come from kernels\(.*; got Tensor; c"):
            method(SOURCE, IMAGE)
        with pytest.raises(TypeError, match="source must be a tensor; got ndarray; model"):
            method(SOURCE.numpy(), stack.kernels(IMAGE, (2, 2)))
        with pytest.raises(TypeError, match=r"source must be floating-point.*int64"):
            method(SOURCE.long(), stack.kernels(IMAGE, (2, 2)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_stages", 0), ("key_dim", 1.5), ("feat_dim", "a"), ("guidance_dim", 0), ("feat_dim", -1)],
)
def test_numbers_that_make_no_stack_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, a whole .*got {value!r}"):
        JBUStack(**{name: value})


def test_one_number_is_the_short_side_of_the_output():
    stack, source, image = JBUStack().eval(), torch.randn(1, 4, 2, 3), torch.randn(1, 3, 32, 48)
    assert stack(source, image, size=20).shape == (1, 4, 20, 30)
    assert stack.kernels(image, (2, 3), size=20).stages[-1].shape[2:] == (20, 30)


def test_dropout_in_training_drops_whole_hidden_channels_of_a_sample():
    stage = randomise(JBUStage(dropout=0.5).double()).train()
    guidance = torch.randn(1, 3, 6, 6).double()
    torch.manual_seed(3)
    dropped = stage.kernel(guidance)
    torch.manual_seed(3)
    masks = [
        F.dropout2d(torch.ones(1, n, 1, 1).double(), 0.5, training=True).flatten() for n in (32, 49)
    ]
    by_hand = copy.deepcopy(stage).eval()
    with torch.no_grad():
        by_hand.range_proj[3].weight.mul_(masks[0][:, None, None])
        by_hand.fixup_proj[3].weight.mul_(masks[1][:, None, None])
    torch.testing.assert_close(dropped, by_hand.kernel(guidance))
    assert not torch.equal(stage.kernel(guidance), dropped)
