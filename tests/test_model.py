from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from featup_hub import JBUStack, ModuleBackbone, UpsampledBackbone
from featup_hub.backbones import ChannelNorm, MaskClipBackbone
from featup_hub.cli import main
from featup_hub.image import preprocess, read_image
from featup_hub.loading import find_backbone, find_card, load, load_backbone, load_upsampler
from featup_hub.weights import write

NAME = "efficientnet_lite0"


def random_stack(feat_dim: int | None = None) -> JBUStack:
    torch.manual_seed(3)
    return JBUStack(feat_dim).eval()


@pytest.fixture(scope="module")
def model(stages: Path) -> UpsampledBackbone:
    """The shipped backbone behind random stages."""
    return load(NAME, upsampler=stages)


def tiny(upsampler: JBUStack | None = None, *, norm: bool = False) -> UpsampledBackbone:
    torch.manual_seed(4)
    backbone = ModuleBackbone(nn.Conv2d(3, 6, 8, stride=8), feat_dim=6, patch_size=8)
    upsampler = random_stack() if upsampler is None else upsampler
    return UpsampledBackbone(backbone, upsampler, norm=ChannelNorm(6) if norm else None).eval()


# What a model computes


@torch.no_grad()
def test_a_model_is_backbone_norm_and_upsampler(model):
    image = torch.randn(1, 3, 64, 80)
    low = model.backbone(image)
    normed = F.layer_norm(low.permute(0, 2, 3, 1), (112,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.source(image), normed)
    torch.testing.assert_close(model(image), model.upsampler(normed, image))


@torch.no_grad()
def test_size_and_implementation_can_be_chosen():
    image, size = torch.randn(1, 3, 30, 40), (64, 80)
    fast, definition = (tiny()(image, size=size, impl=impl) for impl in ("torch", "reference"))
    assert fast.shape == (1, 6, *size)
    torch.testing.assert_close(fast, definition, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("closing", [None, 6])
def test_a_folded_head_equals_the_head_behind_the_model(closing):
    whole, head = tiny(random_stack(closing), norm=True), nn.Conv2d(6, 2, 1)
    image = torch.randn(2, 3, 32, 45)
    folded = whole.fold_head(head)
    assert not folded.training
    torch.testing.assert_close(folded(image), head(whole(image)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_folding_a_head_leaves_the_mode_of_every_part(training):
    whole = tiny(random_stack(None)).train(training)
    whole.backbone.train(not training)  # a frozen backbone, or an upsampler that does not learn
    modes = [part.training for part in whole.modules()]
    folded = whole.fold_head(nn.Conv2d(6, 2, 1))
    assert [part.training for part in whole.modules()] == modes
    assert (
        folded.training == folded.upsampler.training == folded.upsampler.head.training == training
    )


def test_a_second_head_is_refused():
    with pytest.raises(ValueError, match="has a head already; fold one into the model it came"):
        tiny().fold_head(nn.Conv2d(6, 2, 1)).fold_head(nn.Conv2d(2, 2, 1))


def test_what_is_no_backbone_or_no_upsampler_is_refused():
    with pytest.raises(TypeError, match=r"got Conv2d; take .* or wrap a module: ModuleBackbone\("):
        UpsampledBackbone(nn.Conv2d(3, 3, 1), JBUStack())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"an upsampler must be a JBUStack, .*; got Upsample"):
        tiny(nn.Upsample(scale_factor=8))
    for given in (JBUStack(), 5, False):
        for loader in (load_upsampler, partial(load, NAME)):
            with pytest.raises(TypeError, match=rf"got {type(given).__name__}; .*Backbone\(load_b"):
                loader(upsampler=given)
    with pytest.raises(ValueError, match=r"weights must be a file; . is a folder"):
        load(NAME, upsampler="")


@pytest.mark.parametrize(
    "loader", [partial(load, NAME), partial(load_backbone, NAME), load_upsampler]
)
def test_a_file_given_as_pretrained_is_refused(loader):
    with pytest.raises(TypeError, match=r"or False; got 'a.pth'; .* backbone_weights= of load"):
        loader(pretrained="a.pth")
    loader(pretrained=0)
    loader(pretrained=np.bool_(False))


def test_gradients_reach_backbone_norm_and_upsampler():
    whole = tiny(norm=True)
    whole(torch.randn(1, 3, 16, 16)).square().sum().backward()
    assert whole.norm is not None
    for part in (whole.backbone, whole.norm, whole.upsampler.up4):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


# How a model is loaded


def test_loading_leaves_the_random_state_alone(stages):
    before = torch.get_rng_state()
    load(NAME, upsampler=stages)
    load_backbone(NAME)
    load_upsampler(stages)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_upsampler_is_found_in_the_folder_where_it_was_saved(root, tmp_path):
    stack = random_stack()
    stack.save_pretrained(tmp_path / "mine")
    found = load(NAME, upsampler=tmp_path / "mine").stack.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stack.state_dict().items())
    command = ["upsample", str(root / "tests/data/chelsea.jpg"), "--size", "32", "--no-picture"]
    assert main([*command, "--upsampler", f"{tmp_path}/mine", "--out", f"{tmp_path}/out"]) == 0


def test_models_come_in_evaluation_mode_on_the_cpu(stages):
    with torch.device("meta"):
        model = load(NAME, upsampler=stages)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(part.training for part in model.modules())
    assert not any(part.training for part in load_backbone(NAME).modules())
    assert not any(part.training for part in load_upsampler(stages).modules())
    assert not any(part.training for part in load(NAME, pretrained=False).modules())


def test_random_weights_are_drawn_as_everywhere_in_torch():
    torch.manual_seed(5)
    first, second = (load(NAME, pretrained=False) for _ in range(2))
    torch.manual_seed(5)
    third = load(NAME, pretrained=False)
    name = "upsampler.up1.range_proj.0.weight"
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert torch.equal(first.state_dict()[name], third.state_dict()[name])


@torch.no_grad()
def test_the_shipped_backbone_tells_a_cat_from_a_cup(root):
    backbone = load_backbone(NAME)

    def pooled(name):
        photo = read_image(root / "tests" / "data" / name)
        image = preprocess(photo, size=(224, 224), mean=backbone.mean, std=backbone.std)
        return backbone(torch.cat([image, image.flip(-1)])).mean((2, 3))

    cat, cup = pooled("chelsea.jpg"), pooled("coffee.jpg")
    same = min(float(F.cosine_similarity(*pair, dim=0)) for pair in (cat, cup))
    assert same > float(F.cosine_similarity(cat, cup).max()) + 0.1


def test_without_a_norm_features_are_the_backbones_own(stages):
    plain = load(NAME, use_norm=False, upsampler=stages)
    image = torch.randn(1, 3, 48, 48)
    assert plain.norm is None
    with torch.no_grad():
        assert torch.equal(plain.source(image), plain.backbone(image))


def test_a_norm_in_the_file_is_loaded(tmp_path):
    norm = {"norm.weight": torch.rand(112), "norm.bias": torch.rand(112)}
    write({**random_stack(112).state_dict(), **norm}, tmp_path / "all.safetensors")
    loaded = load(NAME, upsampler=tmp_path / "all.safetensors")
    assert loaded.norm is not None
    assert torch.equal(loaded.norm.weight, norm["norm.weight"])
    assert torch.equal(loaded.norm.bias, norm["norm.bias"])
    with pytest.raises(ValueError, match=r"trained behind a channel norm, .* leave it at True"):
        load(NAME, use_norm=False, upsampler=tmp_path / "all.safetensors")
    with pytest.raises(ValueError, match=r"holds a channel norm, .* load both"):
        load_upsampler(tmp_path / "all.safetensors")


def test_an_upsampler_trained_without_a_norm_gets_none(tmp_path):
    write(random_stack(112).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"without a channel norm; .* pass use_norm=False"):
        load(NAME, upsampler=tmp_path / "bare.safetensors")
    loaded = load(NAME, use_norm=False, upsampler=tmp_path / "bare.safetensors")
    assert loaded.upsampler.feat_dim == 112


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsampler": "odd"}, "does not fit JBUStack"),
        ({"upsampler": "other", "use_norm": False}, "made for 7 channels; the backbone has 112"),
        ({"backbone_weights": "odd"}, "are not those of timm's tf_efficientnet_lite0"),
        ({"upsampler": "missing"}, r"no weights file .*missing\.safetensors"),
        ({"backbone_weights": "missing"}, r"no weights file .*missing\.safetensors"),
        ({"name": "jbu"}, r"got 'jbu', an upsampler alone; call load_upsampler\(\)"),
        ({"name": "dinov22"}, "did you mean 'dinov2'"),
    ],
)
def test_a_model_or_a_file_that_does_not_fit_is_refused(options, message, tmp_path):
    write({"weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    write(random_stack(7).state_dict(), tmp_path / "other.safetensors")
    for key in {"upsampler", "backbone_weights"} & options.keys():
        options = {**options, key: tmp_path / f"{options[key]}.safetensors"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(**{"name": NAME, **options})


def test_a_file_left_out_behind_a_name_is_not_taken_for_none():
    with pytest.raises(ValueError, match=r"a file must follow 'dinov2='; give it, or"):
        find_backbone("dinov2=")


@pytest.mark.parametrize("name", [nn.Conv2d(3, 3, 1), None, 5])
def test_what_is_no_name_is_refused_with_what_takes_modules(name):
    with pytest.raises(TypeError, match=r"named by a string; got \w+; wrap a module of your own"):
        load(name)


def test_an_image_size_is_a_multiple_of_the_stride():
    # SigLIP's So400m has patches of 14 pixels and images of 384; 378 is the nearest multiple.
    model = load("timm/test_vit", pretrained=False, backbone_kwargs={"patch_size": 14})
    assert model.image_size == 154
    assert model.preprocess(Image.new("RGB", (200, 160))).shape == (1, 3, 154, 196)


def test_where_the_table_and_timm_share_a_name_the_table_wins_unless_told():
    assert find_card("resnet50").backbone == "resnet50.tv_in1k"
    assert find_card("timm/resnet50").backbone == "resnet50"


@torch.no_grad()
def test_maskclip_works_with_its_defaults(stages):
    loaded = load("maskclip", pretrained=False, upsampler=stages)
    assert isinstance(loaded.backbone, MaskClipBackbone)
    assert loaded(torch.randn(1, 3, 48, 40)).shape == (1, 512, 48, 40)


def test_four_looks_are_a_source_of_half_the_stride():
    model = load("efficientnet_lite0", looks=np.int64(4))
    image = torch.randn(1, 3, 64, 48)
    assert model.patch_size == 8
    assert model.source(image).shape == (1, 112, 8, 6)
    assert model(image).shape == (1, 112, 64, 48)


@pytest.mark.parametrize("looks", [0, 3, 4.0, "4"])
@pytest.mark.parametrize(
    ("name", "layer", "options", "fitting"),
    [
        (NAME, None, None, "1, 4, 16, 64, 256"),
        (NAME, 0, None, "1, 4"),  # of stride 2
        ("test_vit", None, {"patch_size": 14}, "1, 4, 49, 196"),
    ],
)
def test_looks_that_do_not_fit_the_stride_bring_those_that_do(name, layer, options, fitting, looks):
    with pytest.raises(ValueError, match=rf"^looks must be one of {fitting}, .*; got {looks!r}$"):
        load(name, layer=layer, backbone_kwargs=options, looks=looks, pretrained=False)


def test_looks_that_do_not_fit_are_refused_before_weights_are_read():
    with pytest.raises(ValueError, match="looks must be one of"):
        load(NAME, looks=3, upsampler="missing.safetensors")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        *((device, "must be cpu, cuda, cuda:1 or mps; got") for device in ("gpu", 3.5, "mps:x")),
        ("cuda:99", "cuda:99 cannot be used here: "),
    ],
)
def test_a_device_that_there_is_not_is_refused_before_weights_are_read(device, message):
    for loading in (lambda **options: load(NAME, **options), load_upsampler):
        with pytest.raises(ValueError, match=f"device {message}"):
            loading(upsampler="missing.safetensors", device=device)
