"""Sources of features: by name, by file, by plug-in; and in half precision."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from featup_hub.backbones import Backbone
from featup_hub.evaluation.features import Source, check_source, open_source
from featup_hub.weights import shipped_folder


class Times(Backbone):
    """The mean colour of every 16-px cell, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__(feat_dim=3, patch_size=16)
        self.factor = factor

    def features(self, image):
        return torch.nn.functional.avg_pool2d(image, 16) * self.factor


def test_features_are_those_of_the_backbone_in_half_precision():
    image = torch.randn(1, 3, 32, 48)
    found = Source(name="x", backbone=Times()).encode(image)
    assert torch.equal(found, Times()(image).half().float())


def test_features_that_half_precision_cannot_hold_are_refused():
    message = r"must fit half precision, .* at most 65504; those of 'x' reach \d+.*scale them down"
    with pytest.raises(ValueError, match=message):
        Source(name="x", backbone=Times(1e6)).encode(torch.ones(1, 3, 32, 48))


def test_a_backbone_is_found_by_its_name_and_called_by_its_label():
    found = open_source("net=efficientnet_lite0")
    assert (found.name, found.backbone.feat_dim) == ("net", 112)
    assert not any(each.requires_grad for each in found.backbone.parameters())
    assert open_source("efficientnet_lite0").identity == found.identity


def test_a_plug_in_gives_a_backbone(monkeypatch):
    module = types.ModuleType("somebodys_backbone")
    module.times = Times
    monkeypatch.setitem(sys.modules, "somebodys_backbone", module)
    check_source("theirs=somebodys_backbone:times")
    found = open_source("theirs=somebodys_backbone:times")
    assert (found.name, type(found.backbone)) == ("theirs", Times)


def test_a_plug_in_that_cannot_be_imported_is_refused():
    with pytest.raises(ValueError, match=r"must be importable; got 'no_such_module:x'"):
        check_source("no_such_module:x")


def test_a_backbone_s_own_weights_are_named_as_on_every_command_and_as_before() -> None:
    file = shipped_folder() / "efficientnet_lite0.safetensors"
    now, before = (
        open_source(f"efficientnet_lite0={file}"),
        open_source(f"b=efficientnet_lite0@{file}"),
    )
    assert (now.name, before.name) == ("efficientnet_lite0=efficientnet_lite0", "b")
    assert now.identity == before.identity
    assert open_source("b=efficientnet_lite0").name == "b"
