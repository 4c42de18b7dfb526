"""Sources of features: by name, by file, by plug-in; and in half precision."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from featup_hub.evaluation.candidates import is_plug_in
from featup_hub.evaluation.features import VERSION, Source, find_source
from featup_hub.weights import digest, shipped_folder
from tests.evaluation.conftest import MeanColour


def test_features_are_those_of_the_backbone_in_half_precision_if_it_holds_them():
    image = torch.randn(1, 3, 32, 48)
    found = Source(name="x", backbone=MeanColour()).encode(image)
    assert torch.equal(found, MeanColour()(image).half().float())
    message = r"must fit half precision, .* at most 65504; those of 'x' reach \d+.*scale them down"
    with pytest.raises(ValueError, match=message):
        Source(name="x", backbone=MeanColour(factor=1e6)).encode(torch.ones(1, 3, 32, 48))


def test_a_backbone_is_found_by_its_name_and_frozen():
    name, load = find_source("efficientnet_lite0")
    found = load()
    assert name == found.name
    assert (found.name, found.backbone.feat_dim) == ("efficientnet_lite0", 112)
    assert not any(each.requires_grad for each in found.backbone.parameters())


def test_a_plug_in_gives_a_backbone_and_its_callable_the_name():
    found = find_source("tests.evaluation.conftest:MeanColour")[1]()
    assert (found.name, type(found.backbone)) == ("MeanColour", MeanColour)
    with pytest.raises(ValueError, match=r"must be importable; got 'no_such_module:x'"):
        find_source("no_such_module:x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nn:ReLU", r"a plug-in must return a featup_hub.Backbone; '.*' gave ReLU; wrap a module"),
        ("nn:Linear", r"callable as Linear\(\); got .*missing a required argument: 'in_features'"),
    ],
)
def test_a_plug_in_that_gives_no_backbone_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_source(f"torch.{name}")[1]()


@pytest.mark.parametrize("name", ["hf-hub:owner/some.vit", "hf_hub:owner/some.vit"])
def test_timms_name_of_a_repository_is_not_taken_for_a_plug_in(name):
    assert not is_plug_in(name)


def test_tables_call_a_backbone_s_own_weights_by_their_file_and_the_cache_by_their_content():
    file = shipped_folder() / "efficientnet_lite0.safetensors"
    own = find_source(f"efficientnet_lite0={file}")[1]()
    assert own.name == "efficientnet_lite0=efficientnet_lite0"
    assert own.identity == find_source("efficientnet_lite0")[1]().identity  # the file it ships
    assert own.identity == f"{VERSION} efficientnet_lite0 {digest(file)}"


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_a_plug_in_typed_into_an_interpreter_has_no_file_to_be_known_by(file, monkeypatch):
    typed = types.ModuleType("typed")
    typed.mine, typed.__file__ = MeanColour, file
    monkeypatch.setitem(sys.modules, "typed", typed)
    assert find_source("typed:mine")[1]().identity is None
    assert find_source("tests.evaluation.conftest:MeanColour")[1]().identity
