"""Sums and features are kept on disk, and measured again after a change of their inputs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from featup_hub.backbones import Backbone
from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.features import Source
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.run import measure
from featup_hub.upsamplers import baselines


class MeanColour(Backbone):
    def __init__(self):
        super().__init__(feat_dim=3, patch_size=16)
        self.calls = 0

    def features(self, image):
        self.calls += 1
        return torch.nn.functional.avg_pool2d(image, 16)


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, source, image, size):
        self.calls += 1
        return baselines.nearest(source, image, size)


def run(root, cache, function, *, backbone=None, name="a", identity="1", changes=None, **settings):
    """Measures the oracle, or a frozen probe if there is a backbone."""
    changes = changes or {}
    data = [tuple(replace(open_data(f"folder:{root}", s), **changes) for s in ("train", "val"))]
    protocol = "preservation" if backbone else "oracle"
    config = EvaluationConfig(
        protocols=(protocol,), strides=(16,), cache=cache, probe_steps=5, **settings
    )
    sources = [Source(name="x", backbone=backbone, identity="colour")] if backbone else []
    upsampler = Candidate(name=name, function=function, identity=identity)
    return next(measure(data, sources, [upsampler], config))


@pytest.fixture
def root(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    return tmp_path / "scenes"


def test_what_was_measured_once_is_read_from_the_cache_under_any_name(root, tmp_path):
    function = Counted()
    first = run(root, tmp_path / "c", function)
    calls = function.calls
    again = run(root, tmp_path / "c", function, name="b")
    assert function.calls == calls > 0
    before, after = first.sums["a"]["band"], again.sums["b"]["band"]
    assert torch.equal(torch.stack(before), torch.stack(after))
    assert (first.protocol, first.data, first.block) == (again.protocol, again.data, again.block)


@pytest.mark.parametrize("kind", ["images", "labels", "depth"])
def test_a_file_that_changed_is_measured_again(root, tmp_path, kind):
    function = Counted()
    run(root, tmp_path / "c", function)
    calls = function.calls
    picture = Image.new("RGB" if kind == "images" else "L", (48, 32))
    picture.save(root / "val" / kind / "0.png")
    run(root, tmp_path / "c", function)
    assert function.calls == 2 * calls


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "2"},
        {"seed": 1},
        {"changes": {"classes": 1}},
        {"changes": {"label_map": (1, 0)}},
        {"changes": {"depth_scale": 10.0}},
        {"changes": {"max_side": 32}},
    ],
    ids=str,
)
def test_another_file_or_setting_is_measured_again(root, tmp_path, change):
    function = Counted()
    run(root, tmp_path / "c", function)
    calls = function.calls
    run(root, tmp_path / "c", function, **change)
    assert function.calls > calls


@pytest.mark.parametrize("missing", ["cache", "identity"])
def test_without_a_cache_or_an_identity_everything_is_measured_every_time(root, tmp_path, missing):
    function = Counted()
    for _ in range(2):
        cache = None if missing == "cache" else tmp_path / "c"
        run(root, cache, function, identity=None if missing == "identity" else "1")
    assert function.calls == 12
    assert not (tmp_path / "c").exists()


def test_features_are_computed_once_per_image_and_again_if_it_changed(root, tmp_path):
    backbone, function = MeanColour(), Counted()
    for identity in ("1", "2"):
        run(root, tmp_path / "c", function, backbone=backbone, identity=identity)
    assert backbone.calls == 7
    Image.new("RGB", (48, 32)).save(root / "val" / "images" / "0.png")
    run(root, tmp_path / "c", function, backbone=backbone)
    assert backbone.calls == 8
