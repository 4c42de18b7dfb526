from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.backbones import TimmBackbone, timm_card
from featup_hub.weights import read
from tests.backbones import native

VITS = [
    "test_vit",  # class token
    "test_vit2",  # register, no class token
    "test_vit4",  # RMS norm
    "deit_tiny_distilled_patch16_224",  # class and distillation token
    "eva02_tiny_patch14_224",  # rotary positions, patch 14
    "vit_small_patch16_dinov3",  # rotary positions, class token and four registers
]


@pytest.mark.parametrize("name", VITS)
def test_a_vit_gives_its_normalised_patch_tokens(name):
    donor = timm.create_model(name).eval()
    size = donor.pretrained_cfg["input_size"][-1]
    backbone = TimmBackbone(name, weights=donor.state_dict()).eval()
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        tokens = donor.forward_features(native(donor.pretrained_cfg, image))[
            :, donor.num_prefix_tokens :
        ]
        source = backbone(image)
    if not isinstance(donor.norm, torch.nn.Identity):  # else the head's norm comes after pooling
        torch.testing.assert_close(source.flatten(2).mT, tokens, atol=1e-4, rtol=1e-4)


def test_pretrained_false_holds_whatever_timm_is_given(monkeypatch):
    asked = []

    def create_model(name, *, pretrained, **kwargs):
        asked.append(pretrained)
        return make(name, **kwargs)

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    TimmBackbone("test_vit", backbone_kwargs={"pretrained": True})
    assert asked == [False]


@pytest.mark.parametrize("size", [(64, 96), (240, 112)])
def test_position_embeddings_follow_the_image(size):
    donor = timm.create_model("test_vit")
    tensors = donor.state_dict()
    fixed = timm.create_model(
        "test_vit",
        img_size=size,
        dynamic_img_size=False,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(tensors)},
    ).eval()
    assert fixed.pos_embed.shape != donor.pos_embed.shape
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        tokens = fixed.forward_features(native(donor.pretrained_cfg, image))[:, 1:]
        source = TimmBackbone("test_vit", weights=tensors).eval()(image)
    torch.testing.assert_close(source.flatten(2).mT, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 3, -2])
@pytest.mark.parametrize("norm", [True, False])
def test_the_chosen_block_is_the_one_taken(layer, norm):
    donor = timm.create_model("test_vit").eval()
    torch.nn.init.normal_(donor.norm.weight)
    seen: list[Tensor] = []
    donor.blocks[layer].register_forward_hook(lambda *args: seen.append(args[2]))
    backbone = TimmBackbone("test_vit", weights=donor.state_dict(), layer=layer, norm=norm).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        donor(native(donor.pretrained_cfg, image))
        expected = donor.norm(seen[0]) if norm else seen[0]
        torch.testing.assert_close(
            backbone(image).flatten(2).mT, expected[:, 1:], atol=1e-5, rtol=1e-5
        )
    assert len(backbone.model.blocks) == layer % 6 + 1


@pytest.mark.parametrize(("stride", "feat_dim"), [(8, 40), (16, 112), (32, 320)])
def test_a_cnn_gives_the_deepest_features_of_a_stride(stride, feat_dim):
    donor = timm.create_model("tf_efficientnet_lite0").eval()
    backbone = TimmBackbone(
        "tf_efficientnet_lite0", weights=donor.state_dict(), stride=stride
    ).eval()
    assert (backbone.patch_size, backbone.feat_dim) == (stride, feat_dim)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        levels = donor.forward_intermediates(
            native(donor.pretrained_cfg, image), intermediates_only=True
        )
        source = backbone(image)
    (expected,) = [level for level in levels if level.shape[1] == feat_dim]
    torch.testing.assert_close(source, expected, atol=1e-4, rtol=1e-4)


def test_what_lies_behind_the_features_is_removed():
    whole = sum(p.numel() for p in timm.create_model("tf_efficientnet_lite0").parameters())
    left = sum(p.numel() for p in TimmBackbone("tf_efficientnet_lite0", stride=16).parameters())
    assert left < 0.3 * whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.2.attn.qkv.weight": None}, r"1 missing: blocks.2.attn.qkv.weight;"),
        ({"blocks.9.x": torch.zeros(1)}, r"1 not known here: blocks.9.x;"),
        (
            {"blocks.2.attn.qkv.weight": torch.zeros(3, 64)},
            r"1 of another shape: blocks.2.*weight \(3, 64\), needed \(192, 64\);",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    tensors = {**timm.create_model("test_vit").state_dict(), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"not those of timm's test_vit: {message} check that"):
        TimmBackbone("test_vit", weights=tensors)


def test_weights_of_another_network_are_refused_with_counts_and_a_few_names():
    tensors = timm.create_model("test_resnet").state_dict()
    with pytest.raises(ValueError, match="are not those of timm's test_vit: ") as caught:
        TimmBackbone("test_vit", weights=tensors)
    own = list(timm.create_model("test_vit").state_dict())
    missing = f"{len(own)} missing: {', '.join(own[:6])} and {len(own) - 6} more; "
    assert f"{missing}{len(tensors)} not known here: " in str(caught.value)
    assert len(str(caught.value)) < 600


def test_weights_that_timm_cannot_even_convert_are_refused_with_its_reason(monkeypatch):
    def convert(*_, **__):
        raise KeyError("patch_embed.proj.weight")

    monkeypatch.setattr(timm, "create_model", convert)
    with pytest.raises(ValueError, match=r"of timm's test_vit: 'patch_embed.proj.weight'; ch"):
        TimmBackbone("test_vit", weights={"norm.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5O", {}, r"no model 'resnet5O'; did you mean .*resnet50.*upgrade"),
        ("resnet18.nope", {}, r"no weights 'resnet18.nope'; it has .*resnet18.a1_in1k"),
        ("test_resnet", {"stride": 14}, r"of strides \[2, 4, 8, 16, 32\]; got stride=14"),
        ("test_vit", {"layer": 6}, "layers 0 to 5; got layer=6"),
        ("test_resnet", {"layer": 1, "stride": 16}, "or by stride; got layer=1 and stride=16"),
    ],
)
def test_what_timm_or_a_network_lacks_is_refused_with_what_there_is(name, options, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name, **options)  # type: ignore[arg-type]


def test_networks_without_intermediate_features_are_refused(monkeypatch):
    monkeypatch.delattr(timm.models.MobileNetV3, "forward_intermediates")
    with pytest.raises(ValueError, match=r"mobilenetv3_small_050 does not offer .*ModuleBackbone"):
        TimmBackbone("mobilenetv3_small_050")


def test_a_timm_that_counts_layers_otherwise_is_noticed():
    backbone = TimmBackbone("test_resnet").eval()
    backbone.layer -= 1  # as timm 1.0.9 does in ConvNeXt
    with pytest.raises(RuntimeError, match=r"announces \d+ channels in layer 3 .*; got .*; upg"):
        backbone(torch.randn(1, 3, 64, 64))


def test_a_network_without_padding_has_each_cell_at_the_centre_of_what_it_sees(monkeypatch):
    # With equal weights and averages for maxima, the gradient is centred on the receptive field.
    def average(x, kernel_size, stride, padding=0, *_, **__):
        return F.avg_pool2d(x, kernel_size, stride, padding)

    monkeypatch.setattr(F, "max_pool2d", average)
    backbone = TimmBackbone("inception_v3").eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    image = torch.ones(1, 3, 416, 480, requires_grad=True)
    source = backbone.features(image)
    assert source.shape == (1, 2048, 13, 15)
    source[0, 0, 6, 8].backward()
    assert image.grad is not None
    for seen, cell in ((image.grad[0].sum((0, 2)), 6), (image.grad[0].sum((0, 1)), 8)):
        centre = seen @ torch.arange(float(len(seen))) / seen.sum()
        assert centre.item() == pytest.approx(32 * (cell + 0.5) - 0.5, abs=1)


@pytest.mark.parametrize(
    ("name", "options", "source"),
    [
        ("samvit_base_patch16", {}, (256, 7, 9)),  # channels behind a neck
        ("gcvit_xxtiny", {"img_size": (256, 320)}, (512, 8, 10)),  # a fixed size, chosen
    ],
)
def test_unusual_networks_give_what_they_announce(name, options, source):
    with torch.device("meta"):
        backbone = TimmBackbone(name, backbone_kwargs=options).eval()
        assert backbone(torch.empty(1, 3, 97, 131)).shape == (1, *source)
    assert backbone.feat_dim == source[0]


@torch.no_grad()
def test_a_network_of_other_bands_takes_them_as_they_are():
    backbone = TimmBackbone("test_resnet", backbone_kwargs={"in_chans": 13}).eval()
    image = torch.randn(1, 13, 64, 64)
    (expected,) = backbone.model.forward_intermediates(
        image, indices=[backbone.layer], intermediates_only=True
    )
    assert torch.equal(backbone(image), expected)
    with pytest.raises(ValueError, match=r"must have 13 bands, \(B, 13, H, W\); got \(1, 3,"):
        backbone(torch.randn(1, 3, 64, 64))


def test_a_card_can_be_made_for_any_network_of_timm():
    row = timm_card("convnext_tiny.fb_in1k")
    assert (row.name, row.image_size) == ("timm/convnext_tiny.fb_in1k", 224)
    assert (row.backbone, row.licence) == ("convnext_tiny.fb_in1k", "apache-2.0")


@pytest.mark.shared
def test_real_vit_weights_give_the_same_structure_at_any_size(shared):
    tensors = read(shared / "backbones" / "dinov2_vits14_saliency_ft.safetensors")
    backbone = TimmBackbone("vit_small_patch14_dinov2", weights=tensors).eval()
    image = F.interpolate(torch.randn(1, 3, 6, 8), (210, 280), mode="bicubic")
    with torch.no_grad():
        fitting, odd = backbone(image), backbone(image[..., :205, :275])
    assert fitting.shape == (1, 384, 15, 20)
    assert odd.shape == (1, 384, 15, 20)
    assert F.cosine_similarity(fitting, odd).mean() > 0.9
