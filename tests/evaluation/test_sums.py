"""Sums and features are kept on disk, and measured again after a change of their inputs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.features import Source
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.run import measure
from featup_hub.upsamplers import baselines
from tests.evaluation.conftest import MeanColour


class Run:
    """Measures the oracle, or a frozen probe of a backbone, and counts calls of the upsampler."""

    def __init__(self, root, cache):
        self.root, self.cache, self.calls = root, cache, 0

    def nearest(self, source, image, size):
        self.calls += 1
        return baselines.nearest(source, image, size)

    def __call__(self, *, backbone=None, name="a", identity="1", changes=None, **settings):
        folder, changes = f"folder:{self.root}", changes or {}
        data = [tuple(replace(open_data(folder, split), **changes) for split in ("train", "val"))]
        config = EvaluationConfig(
            protocols=("preservation" if backbone else "oracle",),
            strides=(16,),
            cache=self.cache,
            probe_steps=5,
            **settings,
        )
        sources = [Source(name="x", backbone=backbone, identity="colour")] if backbone else []
        upsampler = Candidate(name=name, function=self.nearest, identity=identity)
        return next(measure(data, sources, [upsampler], config))


@pytest.fixture
def run(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    return Run(tmp_path / "scenes", tmp_path / "cache")


def test_what_was_measured_once_is_read_from_the_cache_under_any_name(run):
    first = run()
    calls = run.calls
    again = run(name="b")
    assert run.calls == calls > 0
    before, after = first.sums["a"]["band"], again.sums["b"]["band"]
    assert torch.equal(before, after)
    assert (first.protocol, first.data, first.block) == (again.protocol, again.data, again.block)


@pytest.mark.parametrize("kind", ["images", "labels", "depth"])
def test_a_file_that_changed_is_measured_again(run, kind):
    run()
    calls = run.calls
    picture = Image.new("RGB" if kind == "images" else "L", (48, 32))
    picture.save(run.root / "val" / kind / "0.png")
    run()
    assert run.calls == 2 * calls


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "2"},
        {"seed": 1},
        {"changes": {"classes": 3}},
        {"changes": {"label_map": (1, 0)}},
        {"changes": {"depth_scale": 10.0}},
        {"changes": {"max_side": 32}},
    ],
    ids=str,
)
def test_another_file_or_setting_is_measured_again(run, change):
    run()
    calls = run.calls
    run(**change)
    assert run.calls > calls


@pytest.mark.parametrize("missing", ["cache", "identity"])
def test_without_a_cache_or_an_identity_everything_is_measured_every_time(run, missing):
    folder = run.cache
    run.cache = None if missing == "cache" else folder
    for _ in range(2):
        run(identity=None if missing == "identity" else "1")
    assert run.calls == 12
    assert not folder.exists()


def test_features_are_computed_once_per_image_and_again_if_it_changed(run):
    backbone = MeanColour()
    for identity in ("1", "2"):
        run(backbone=backbone, identity=identity)
    assert backbone.calls == 7
    Image.new("RGB", (48, 32)).save(run.root / "val" / "images" / "0.png")
    run(backbone=backbone)
    assert backbone.calls == 8


@pytest.mark.parametrize("damaged", ["empty", "garbage", "cut"])
def test_a_damaged_file_of_the_cache_is_named(run, damaged):
    run()
    (file,) = (run.cache / "sums").iterdir()
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "garbage": b"x" * 99, "cut": whole[:-99]}[damaged])
    with pytest.raises(ValueError, match=rf"whole files; .*{file.name} cannot .*; remove it") as e:
        run()
    assert "weights_only" not in str(e.value)
