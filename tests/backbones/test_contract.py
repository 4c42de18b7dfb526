from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.backbones import Backbone, ChannelNorm
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD
from tests.operations import Recorder


class Seen(Backbone):
    """Hands out the image it was given, averaged over patches."""

    def features(self, image: Tensor) -> Tensor:
        self.image = image
        return F.avg_pool2d(image, self.patch_size)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (16, 5), (100, 17)])
@pytest.mark.parametrize("patch", [14, 16, 32])
def test_a_source_has_one_position_per_patch_begun(size, patch):
    source = Seen(feat_dim=3, patch_size=patch)(torch.randn(2, 3, *size))
    assert source.shape == (2, 3, -(-size[0] // patch), -(-size[1] // patch))


def test_an_image_that_fits_is_not_touched():
    backbone, image = Seen(feat_dim=3, patch_size=14), torch.randn(1, 3, 28, 42)
    backbone(image)
    assert backbone.image is image


@pytest.mark.parametrize("width", [95, 90, 81])
def test_a_source_covers_its_image_edge_to_edge(width):
    # On a ramp, every position must report the colour at the centre of its share of the image.
    ramp = (torch.arange(width) + 0.5).expand(1, 3, 64, width) / width
    source = Seen(feat_dim=3, patch_size=16)(ramp)
    centres = (torch.arange(6) + 0.5) / 6
    torch.testing.assert_close(source[0, 0, 0], centres, atol=2e-3, rtol=0)


def test_a_network_sees_the_image_in_its_own_normalisation():
    colours = torch.rand(1, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    backbone = Seen(feat_dim=3, patch_size=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 1.0))
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    with Recorder() as recorder:
        backbone((colours - mean) / std)
    # A tensor of Python's numbers: on a GPU a copy, which the capture of a graph forbids.
    assert "lift_fresh" not in recorder.names
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.5, 0.4, 0.3], [0.5, 0.2, 1.0]))
    own = (colours - mean) / std
    torch.testing.assert_close(backbone.image, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "mend"),
    [
        ((3, 32, 32), r"; add a batch dimension: image\[None\]"),
        ((1, 32, 32, 3), r"; move the channels: image.movedim\(-1, 1\)"),
        ((1, 1, 32, 32), r"; repeat a grey channel: image.expand\(-1, 3, -1, -1\)"),
        ((1, 4, 32, 32), "$"),
        ((1, 3, 0, 32), "$"),
    ],
)
def test_what_is_no_rgb_image_is_refused_with_the_mend(shape, mend):
    with pytest.raises(ValueError, match=rf"be RGB, \(B, 3, H, W\); got \([\d, ]+\){mend}"):
        Seen(feat_dim=3, patch_size=16)(torch.zeros(shape))


def test_integer_images_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"got torch.uint8; divide by 255, subtract model.mean"):
        Seen(feat_dim=3, patch_size=16)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (8, 8)}, r"patch_size must be at least 1, a whole number; got \(8, 8\)"),
        ({"feat_dim": 0}, "feat_dim must be at least 1, a whole number; got 0"),
        ({"fixed_size": 64}, r"fixed_size must be \(height, width\); got 64"),
        ({"fixed_size": (64,)}, r"fixed_size must be \(height, width\); got \(64,\)"),
        ({"mean": 0.5}, "mean and std must be three numbers each"),
        ({"std": (1, 0, 1)}, r"none of std zero, such as .*; got .* and \(1, 0, 1\)"),
    ],
)
def test_options_that_describe_no_network_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Backbone(**{"feat_dim": 3, "patch_size": 8, **options})


def test_a_backbone_without_features_says_so():
    with pytest.raises(NotImplementedError, match=r"Backbone must define features\(image\)"):
        Backbone(feat_dim=3, patch_size=1)(torch.zeros(1, 3, 4, 4))


def test_the_channel_norm_standardises_each_position():
    norm, source = ChannelNorm(7), 3 * torch.randn(2, 7, 4, 5) + 1
    with torch.no_grad():
        norm.weight.copy_(torch.randn(7))
        norm.bias.copy_(torch.randn(7))
    centred = source - source.mean(1, keepdim=True)
    unit = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = unit * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(source), expected)
