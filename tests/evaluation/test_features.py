"""Sources of features: by name, by file, by plug-in; and in half precision."""

from __future__ import annotations

import pytest
import torch

from featup_hub.evaluation.features import Source, open_source
from featup_hub.weights import shipped_folder
from tests.evaluation.conftest import MeanColour


def test_features_are_those_of_the_backbone_in_half_precision_if_it_holds_them():
    image = torch.randn(1, 3, 32, 48)
    found = Source(name="x", backbone=MeanColour()).encode(image)
    assert torch.equal(found, MeanColour()(image).half().float())
    message = r"must fit half precision, .* at most 65504; those of 'x' reach \d+.*scale them down"
    with pytest.raises(ValueError, match=message):
        Source(name="x", backbone=MeanColour(factor=1e6)).encode(torch.ones(1, 3, 32, 48))


def test_a_backbone_is_found_by_its_name_and_called_by_its_label():
    found = open_source("net=efficientnet_lite0")
    assert (found.name, found.backbone.feat_dim) == ("net", 112)
    assert not any(each.requires_grad for each in found.backbone.parameters())
    assert open_source("efficientnet_lite0").identity == found.identity


def test_a_plug_in_gives_a_backbone():
    found = open_source("theirs=tests.evaluation.conftest:MeanColour")
    assert (found.name, type(found.backbone)) == ("theirs", MeanColour)
    with pytest.raises(ValueError, match=r"must be importable; got 'no_such_module:x'"):
        open_source("no_such_module:x")


def test_timms_name_of_a_repository_is_not_taken_for_a_plug_in(monkeypatch):
    monkeypatch.setattr(
        "featup_hub.evaluation.features.load_backbone",
        lambda name, weights: MeanColour() if weights is None else name,
    )
    for name in ("hf-hub:owner/some.vit", "hf_hub:owner/some.vit"):
        assert open_source(name).identity == f"{name} pretrained"


def test_a_backbone_s_own_weights_are_named_as_on_every_command_and_as_before() -> None:
    file = shipped_folder() / "efficientnet_lite0.safetensors"
    now = open_source(f"efficientnet_lite0={file}")
    before = open_source(f"b=efficientnet_lite0@{file}")
    assert (now.name, before.name) == ("efficientnet_lite0=efficientnet_lite0", "b")
    assert now.identity == before.identity
