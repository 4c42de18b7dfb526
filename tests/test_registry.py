from __future__ import annotations

import pytest
import timm
import torch

from featup_hub.backbones import Backbone, ClipBackbone, MaskClipBackbone, TimmBackbone
from featup_hub.loading import find_card, list_models
from featup_hub.registry import ALIASES, EFFICIENTNET_LITE0, MODELS, UPSAMPLERS
from featup_hub.weights import digest, shipped_folder

WITH_BACKBONE = list_models()


@pytest.mark.parametrize("name", WITH_BACKBONE)
def test_a_card_tells_the_dimensions_of_its_backbone(name):
    row = MODELS[name]
    with torch.device("meta"):
        backbone: Backbone
        if row.kind == "timm":
            backbone = TimmBackbone(row.backbone, stride=row.patch_size)
        else:
            kind = ClipBackbone if row.kind == "clip" else MaskClipBackbone
            backbone = kind(row.backbone)
    assert (backbone.feat_dim, backbone.patch_size) == (row.feat_dim, row.patch_size)
    assert row.image_size % backbone.patch_size == 0


@pytest.mark.parametrize("name", [n for n in WITH_BACKBONE if "lite0" not in n])
def test_timm_knows_the_weights_of_a_backbone_and_their_licence(name):
    row = MODELS[name]
    config = timm.get_pretrained_cfg(row.backbone)
    assert config.hf_hub_id
    assert row.licence.lower().replace(" ", "-") == config.license


@pytest.mark.parametrize("name", ALIASES)
def test_metas_names_are_known_models(name):
    row = find_card(name)
    assert timm.get_pretrained_cfg(row.backbone).hf_hub_id
    size = {"s": "small", "b": "base", "l": "large", "h": "huge", "7": "7b"}
    assert name.endswith(("tiny", "small", "base", "large")) or (
        f"_{size[name.split('_vit')[1][0]]}_" in row.backbone
    )


@pytest.mark.parametrize("file", [EFFICIENTNET_LITE0, *UPSAMPLERS.values()])
def test_shipped_files_have_the_digest_of_their_row(file):
    assert digest(shipped_folder() / file.filename) == file.sha256
    assert str(file.sha256) in (shipped_folder() / file.filename).with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("dinov22", "dinov2"), ("MaskCLP", "maskclip"), ("ResNet", "resnet50"), ("DINOv2", "dinov2")],
)
def test_an_unknown_name_brings_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=rf"got '{typed}'; did you mean .*'{meant}'"):
        find_card(typed)


def test_a_name_like_none_brings_all_models_with_a_backbone():
    names = ", ".join(WITH_BACKBONE)
    with pytest.raises(ValueError, match=rf"got 'jbv'; none is similar\.\n  {names}\n"):
        find_card("jbv")


def test_a_file_behind_a_name_brings_the_argument_that_takes_it():
    hint = r"give the file apart: load\('vit', backbone_weights='a\.pth'\)"
    with pytest.raises(ValueError, match=rf"got 'vit=a\.pth'; {hint}"):
        find_card("vit=a.pth")
