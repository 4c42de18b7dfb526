from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.backbones import ModuleBackbone


class Patches(nn.Module):
    """An embedding of patches that hands its map out in a form to be chosen."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda x: x, *, stride: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, stride, stride=stride)
        self.form = form

    def forward(self, image: Tensor) -> Any:
        return self.form(self.conv(image))


def tokens(x: Tensor, *, prefix: int = 0) -> Tensor:
    return torch.cat([x.new_full((len(x), prefix, x.shape[1]), 9.0), x.flatten(2).mT], dim=1)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "NCHW": lambda x: x,
    "NHWC": lambda x: x.permute(0, 2, 3, 1),
    "tokens": tokens,
    "tokens last": lambda x: x.flatten(2),
    "list": lambda x: [x.new_zeros(1), x],
    "tuple of a list": lambda x: (x.new_zeros(1), [tokens(x)]),
    "dict of one": lambda x: {"anything": x},
    "dict of torchvision": lambda x: {"aux": x.new_zeros(1), "out": x},
    "dict of DINOv2": lambda x: {"x_norm_clstoken": x[..., 0, 0], "x_norm_patchtokens": tokens(x)},
}


@pytest.mark.parametrize("form", FORMS)
def test_features_are_understood_in_every_form(form):
    module, image = Patches(FORMS[form]), torch.randn(2, 3, 32, 56)
    source = ModuleBackbone(module, feat_dim=5, patch_size=8)(image)
    torch.testing.assert_close(source, module.conv(image))


def test_class_and_register_tokens_are_left_out_or_named():
    module, image = Patches(lambda x: tokens(x, prefix=3)), torch.randn(2, 3, 16, 32)
    source = ModuleBackbone(module, feat_dim=5, patch_size=8, prefix_tokens=3)(image)
    torch.testing.assert_close(source, module.conv(image))
    with pytest.raises(ValueError, match=r"needed 2×4 tokens after 0 others; got 11 in all; set p"):
        ModuleBackbone(module, feat_dim=5, patch_size=8)(image)


def test_outputs_of_transformers_are_understood():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    module = transformers.Dinov2WithRegistersModel(config).eval()
    image = torch.randn(1, 3, 42, 28)
    source = ModuleBackbone(module, feat_dim=24, patch_size=14, prefix_tokens=5)(image)
    expected = module(image).last_hidden_state[:, 5:]
    torch.testing.assert_close(source.flatten(2).mT, expected)


def test_the_network_can_be_called_in_ones_own_way():
    module, image = Patches(), torch.randn(1, 3, 16, 16)
    backbone = ModuleBackbone(module, feat_dim=5, patch_size=8, call=lambda m, x: -m.conv(x))
    torch.testing.assert_close(backbone(image), -module.conv(image))


def test_a_convolution_without_padding_is_refused_until_the_image_is_padded():
    conv, image = nn.Conv2d(3, 5, 11, stride=8), torch.randn(1, 3, 32, 32)
    backbone = ModuleBackbone(conv, feat_dim=5, patch_size=8)
    with pytest.raises(ValueError, match=r"got \(1, 5, 3, 3\); .* loses cells .*: pad the"):
        backbone(image)
    padded = F.pad(image, (1, 2, 1, 2), mode="replicate")
    backbone.call = lambda conv, x: conv(F.pad(x, (1, 2, 1, 2), mode="replicate"))
    assert torch.equal(backbone(image), conv(padded))


@pytest.mark.parametrize("form", ["NCHW", "NHWC"])
def test_a_map_of_as_many_rows_and_columns_as_channels_is_taken_rightly(form):
    module, image = Patches(FORMS[form]), torch.randn(2, 3, 40, 40)  # 5 channels, 5×5 cells
    first = ModuleBackbone(module, feat_dim=5, patch_size=8)
    torch.testing.assert_close(first(image), module.conv(image))
    later = ModuleBackbone(module, feat_dim=5, patch_size=8)
    later(torch.randn(1, 3, 16, 24))
    torch.testing.assert_close(later(image), module.conv(image))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_as_many_tokens_as_channels_are_taken_rightly(prefix, last):
    module = Patches(lambda x: tokens(x, prefix=prefix).movedim(1, 2 if last else 1))
    image = torch.randn(2, 3, 8 * (5 - prefix), 8)
    source = ModuleBackbone(module, feat_dim=5, patch_size=8, prefix_tokens=prefix)(image)
    torch.testing.assert_close(source, module.conv(image))


@pytest.mark.parametrize("form", ["NCHW", "NHWC"])
def test_a_map_that_could_be_either_is_taken_as_said_or_refused(form):
    module, image = Patches(FORMS[form]), torch.randn(1, 3, 40, 40)
    options: dict[str, Any] = {"feat_dim": 5, "patch_size": 8, "fixed_size": (40, 40)}
    with pytest.raises(ValueError, match=r"of 5 channels and as many .*: layout='nchw' or "):
        ModuleBackbone(module, **options)(image)
    said: Any = form.lower()
    source = ModuleBackbone(module, **options, layout=said)(image)
    torch.testing.assert_close(source, module.conv(image))


def test_a_layout_that_is_said_is_held_to():
    backbone = ModuleBackbone(Patches(), feat_dim=5, patch_size=8, layout="nhwc")
    with pytest.raises(ValueError, match=r"needed features \(B, 5, 2, 3\)"):
        backbone(torch.randn(1, 3, 16, 24))
    with pytest.raises(ValueError, match="layout must be 'nchw' or 'nhwc'; got 'NHWC'"):
        ModuleBackbone(Patches(), feat_dim=5, patch_size=8, layout="NHWC")  # type: ignore[arg-type]


def test_a_network_of_one_size_sees_the_image_resized_to_it():
    module, image = Patches(), torch.randn(1, 3, 40, 90)
    source = ModuleBackbone(module, feat_dim=5, patch_size=8, fixed_size=(32, 48))(image)
    seen = F.interpolate(image, (32, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(source, module.conv(seen))


def test_images_of_other_bands_are_passed_on_as_they_are():
    module, image = nn.Conv2d(13, 5, 8, stride=8), torch.randn(1, 13, 16, 24)
    backbone = ModuleBackbone(
        module, feat_dim=5, patch_size=8, in_chans=13, mean=(0.5, 0.5, 0.5), std=(1, 1, 1)
    )
    assert torch.equal(backbone(image), module(image))


@pytest.mark.parametrize(
    ("feat_dim", "patch", "form"),
    [
        (6, 8, FORMS["NCHW"]),
        (5, 4, FORMS["NCHW"]),
        (5, 16, FORMS["NHWC"]),
        (6, 8, tokens),
        (5, 8, lambda x: x.mean((2, 3))),
    ],
)
def test_features_unlike_those_announced_are_refused(feat_dim, patch, form):
    backbone = ModuleBackbone(Patches(form), feat_dim=feat_dim, patch_size=patch)
    with pytest.raises(ValueError, match=r"an image of \(64, 64\); got .*; correct them, or sel"):
        backbone(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("output", "got"),
    [({"a": 1, "b": 2}, "a dictionary of a, b"), (None, "NoneType"), ([], "list"), ("x", "str")],
)
def test_what_holds_no_features_is_refused(output, got):
    backbone = ModuleBackbone(Patches(lambda _: output), feat_dim=5, patch_size=8)
    with pytest.raises(TypeError, match=f"needed a tensor of features.*; got {got}; select"):
        backbone(torch.randn(1, 3, 16, 16))
