"""Features are kept under everything that decides them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featup_hub.backbones import (
    Backbone,
    ClipBackbone,
    MaskClipBackbone,
    ModuleBackbone,
    TimmBackbone,
)
from featup_hub.evaluation.features import CachedFeatures, fingerprint
from featup_hub.evaluation.layouts import open_data

CLIP = "vit_base_patch32_clip_quickgelu_224"


class Times(Backbone):
    """The mean colour of every 16-px cell, times a factor that is no weight."""

    def __init__(self, factor):
        super().__init__(feat_dim=3, patch_size=16)
        self.factor = factor

    def features(self, image):
        return torch.nn.functional.avg_pool2d(image, 16) * self.factor


class Plus(Times):
    def features(self, image):
        return super().features(image) + 1


def kept(scenes, backbone, cache):
    return next(iter(CachedFeatures(open_data(f"folder:{scenes}", "val"), backbone, cache=cache)))[
        1
    ]


@pytest.mark.parametrize("other", [Times(2), Plus(1)], ids=["setting", "class"])
def test_two_backbones_without_weights_share_no_cache(scenes, tmp_path, other):
    first = kept(scenes, Times(1), tmp_path)
    assert not torch.equal(kept(scenes, other, tmp_path), first)
    assert torch.equal(kept(scenes, Times(1), tmp_path), first)


def test_clip_and_maskclip_of_the_same_weights_have_their_own_features():
    clip, maskclip = ClipBackbone(CLIP), MaskClipBackbone(CLIP)
    maskclip.load_state_dict(clip.state_dict())
    assert fingerprint(clip) != fingerprint(maskclip)


def test_layer_and_norm_count_and_the_same_backbone_twice_is_the_same():
    name = "vit_tiny_patch16_224"
    backbone = TimmBackbone(name).eval()
    known = {fingerprint(backbone)}
    for change in ({"layer": 3}, {"norm": False}):
        for setting, value in change.items():
            before = getattr(backbone, setting)
            setattr(backbone, setting, value)
            known.add(fingerprint(backbone))
            setattr(backbone, setting, before)
    assert len(known) == 3
    again = TimmBackbone(name).eval()
    again.load_state_dict(backbone.state_dict())
    assert fingerprint(again) == fingerprint(backbone)
    backbone(torch.zeros(1, 3, 32, 32))  # a call leaves no trace
    assert fingerprint(again) == fingerprint(backbone)


def times(number):
    return lambda m, x: number * m(x)


def test_how_a_user_s_network_is_called_counts():
    convolution = nn.Conv2d(3, 4, 16, stride=16)

    def wrapped(call):
        return fingerprint(ModuleBackbone(convolution, feat_dim=4, patch_size=16, call=call))

    calls = [lambda m, x: m(x), lambda m, x: 2 * m(x), lambda m, x: 3 * m(x), None]
    calls += [lambda m, x, n=n: n * m(x) for n in (2, 3)]
    calls += [times(n) for n in (2, 3)]
    assert len({wrapped(call) for call in calls}) == 8
    assert wrapped(times(2)) == wrapped(times(2))


@pytest.mark.parametrize("keep", [True, False])
def test_features_that_half_precision_cannot_hold_are_refused(scenes, tmp_path, keep):
    cache = tmp_path if keep else None
    message = r"must fit half precision, .* at most 65504; those of '0' reach \d+.*scale them down"
    with pytest.raises(ValueError, match=message):
        kept(scenes, Times(1e6), cache)
    assert not list(tmp_path.rglob("*.safetensors"))
