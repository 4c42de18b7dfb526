from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from featup_hub.backbones import ClipBackbone, MaskClipBackbone
from tests.backbones import native

NAME = "vit_xsmall_patch16_clip_224"


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    """A small CLIP tower whose norms and projection are no identities."""
    torch.manual_seed(1)
    model = timm.create_model(NAME).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    return model


@torch.no_grad()
def test_clip_projects_every_patch_token_as_clip_its_class_token(donor):
    image = torch.randn(2, 3, 224, 224)
    tokens = donor.forward_features(native(donor.pretrained_cfg, image))
    torch.testing.assert_close(donor.head(tokens[:, 0]), donor(native(donor.pretrained_cfg, image)))
    source = ClipBackbone(NAME, weights=donor.state_dict()).eval()(image)
    assert source.shape == (2, 512, 14, 14)
    torch.testing.assert_close(
        source.flatten(2).mT, donor.head(tokens[:, 1:]), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [NAME, "eva02_base_patch16_clip_224", "eva_giant_patch14_clip_224"]
)
def test_maskclip_is_the_last_attention_of_every_token_to_itself_alone(name):
    # A sequence of one token attends to itself with weight one: its value, whatever q and k are.
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    backbone = MaskClipBackbone(name, backbone_kwargs=small).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    image, block = torch.randn(1, 3, 112, 224), backbone.model.blocks[-1]
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbone.model.forward_features(native(backbone.model.pretrained_cfg, image))
    alone = seen[0][0, 1:, None]  # (N, 1, D)
    expected = backbone.model.head(backbone.model.norm(block.attn(block.norm1(alone))))[:, 0]
    torch.testing.assert_close(backbone(image)[0].flatten(1).mT, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [ClipBackbone, MaskClipBackbone])
@torch.no_grad()
def test_other_and_odd_sizes_are_taken(kind):
    backbone = kind(NAME).eval()  # type: ignore[call-arg]
    assert backbone(torch.randn(1, 3, 50, 97)).shape == (1, 512, 4, 7)


@pytest.mark.parametrize(
    "name", ["test_resnet", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"]
)
def test_what_is_no_clip_tower_is_refused(name):
    with pytest.raises(ValueError, match=f"a projection; timm's {name} lacks one"):
        ClipBackbone(name)
