"""What is kept is kept under all that decides it: files as they are, and how they are read."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from featup_hub.backbones import ModuleBackbone
from featup_hub.evaluation import cam, protocol
from featup_hub.evaluation.candidates import candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.protocol import measure


def confusion(root, cache, **changes):
    """Measures the oracle of nearest and returns its sums over all images."""
    train, val = (replace(open_data(f"folder:{root}", s), **changes) for s in ("train", "val"))
    config = EvaluationConfig(protocols=("oracle",), strides=(16,), cache=cache)
    found = next(iter(measure([(train, val)], {}, [candidate("nearest")], config)))
    return torch.stack(found.sums["nearest"]["confusion"]).sum(0)


@pytest.mark.parametrize("kind", ["images", "labels", "depth"])
def test_files_that_were_changed_in_place_are_measured_again(scenes, tmp_path, kind):
    root, cache = tmp_path / "scenes", tmp_path / "cache"
    shutil.copytree(scenes, root)
    confusion(root, cache)
    confusion(root, cache)
    assert len(list(cache.glob("sums/*"))) == 1
    path = root / "val" / kind / "0.png"
    Image.new("RGB" if kind == "images" else "L", (48, 32)).save(path)
    confusion(root, cache)
    assert len(list(cache.glob("sums/*"))) == 2


def test_a_corrected_label_of_the_same_size_is_measured_again(scenes, tmp_path):
    root, cache = tmp_path / "scenes", tmp_path / "cache"
    shutil.copytree(scenes, root)
    before = confusion(root, cache)
    for path in (root / "val" / "labels").iterdir():
        status = path.stat()
        Image.new("L", (48, 32), 1).save(path)
        path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not torch.equal(confusion(root, cache), before)


@pytest.mark.parametrize(
    "change", [{"classes": 1}, {"label_map": (1, 0)}, {"depth_scale": 10.0}, {"max_side": 32}]
)
def test_truth_that_is_read_otherwise_is_measured_again(scenes, tmp_path, change):
    confusion(scenes, tmp_path)
    confusion(scenes, tmp_path, **change)
    assert len(list(tmp_path.glob("sums/*"))) == 2


def test_blocks_of_images_decide_no_sums(scenes, tmp_path):
    confusion(scenes, tmp_path)
    confusion(scenes, tmp_path, block=3)
    assert len(list(tmp_path.glob("sums/*"))) == 1


def test_an_image_that_was_changed_has_new_features(scenes, tmp_path):
    root, cache = tmp_path / "scenes", tmp_path / "cache"
    shutil.copytree(scenes, root)
    config = EvaluationConfig(protocols=("preservation",), cache=cache, probe_steps=5)
    backbone = ModuleBackbone(nn.AvgPool2d(16), feat_dim=3, patch_size=16)

    def sums():
        data = [tuple(open_data(f"folder:{root}", split) for split in ("train", "val"))]
        list(measure(data, {"colour": backbone}, [candidate("nearest")], config))
        return len(list(cache.glob("stride16-*/*/*")))

    assert sums() == 7
    Image.new("RGB", (48, 32)).save(root / "val" / "images" / "0.png")
    assert sums() == 8


@pytest.mark.parametrize("change", ["photo", "list", "classifier"])
def test_other_photographs_or_another_classifier_are_measured_again(tmp_path, monkeypatch, change):
    classifier = cam.Classifier(
        features=lambda image: torch.nn.functional.avg_pool2d(image[:, :1], 16),
        weight=torch.tensor([[1.0], [-1.0]]),
        bias=torch.zeros(2),
    )
    monkeypatch.setattr(cam, "open_classifier", lambda name: classifier)

    def run(network):
        monkeypatch.setattr(protocol, "open_network", lambda name: network)
        photos = tmp_path / "photos"
        config = EvaluationConfig(protocols=("cam",), photos=photos, cache=tmp_path / "cache")
        list(measure([], {}, [candidate("nearest")], config))
        return len(list((tmp_path / "cache").glob("sums/*")))

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / "a.png")
    network = nn.Linear(1, 2)
    assert run(network) == 1
    assert run(network) == 1
    if change == "photo":
        Image.new("RGB", (64, 64), "blue").save(tmp_path / "photos" / "a.png")
    elif change == "list":
        Image.new("RGB", (32, 32), "blue").save(tmp_path / "photos" / "b.png")
    else:
        network = nn.Linear(1, 2)  # of other weights
    assert run(network) == 2


@pytest.mark.parametrize("name", ["oracle", "preservation", "cam"])
def test_without_a_cache_no_time_goes_into_digests(scenes, tmp_path, monkeypatch, name):
    def refuse(*_):
        raise AssertionError("a digest was made")

    for function in ("fingerprint", "stamp", "_digest", "open_network"):
        monkeypatch.setattr(protocol, function, refuse)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    config = EvaluationConfig(protocols=(name,), strides=(16,), probe_steps=5, photos=tmp_path)
    backbone = ModuleBackbone(nn.AvgPool2d(16), feat_dim=3, patch_size=16)
    data = [tuple(open_data(f"folder:{scenes}", split) for split in ("train", "val"))]
    assert list(measure(data, {"colour": backbone}, [candidate("nearest")], config))
