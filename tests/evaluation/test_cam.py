"""Class activation maps of a simple classifier, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featup_hub.backbones import create
from featup_hub.evaluation import cam
from featup_hub.evaluation.cam import (
    Classifier,
    cam_sums,
    measure_cam,
    open_classifier,
    open_photos,
)
from featup_hub.evaluation.candidates import candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.scores import METRICS
from featup_hub.image import preprocess, read_image
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD
from featup_hub.weights import load, shipped_folder

RED = Classifier(  # two classes, for and against red, averaged over 2×2 cells of 2×2 pixels
    features=lambda image: F.avg_pool2d(image[:, :1], 2),
    weight=torch.tensor([[1.0], [-1.0]]),
    bias=torch.zeros(2),
)


def scores(first, last):
    """Scores of a grey image whose first and last quadrants have these colours."""
    image = torch.zeros(1, 3, 4, 4)
    image[..., :2, :2], image[..., 2:, 2:] = first, last
    sums = cam_sums(image, RED, candidate("nearest"))["cam"]
    return {metric.name: float(metric.value(sums)) for metric in METRICS if metric.sums == "cam"}


def test_a_map_that_keeps_all_evidence_drops_nothing():
    found = scores(4, 0)  # the mean is 1; outside the quadrant there is nothing to lose
    assert found["Average Drop"] == pytest.approx(0, abs=1e-6)
    assert found["Average Increase"] == 0
    assert found["Coherency"] == pytest.approx(1)
    assert found["Complexity"] == pytest.approx(1 / 4)
    assert found["ADCC"] == pytest.approx(3 / (1 + 4 / 3 + 1))


def test_masking_what_speaks_against_the_class_is_an_increase():
    found = scores(4, -3.9)
    assert (found["Average Increase"], found["Average Drop"]) == (1, 0)


def test_the_drop_is_relative_to_the_confidence_before():
    # Scaled to [0, 1] the map is 1 and 1/2, so the mean falls from 3/2 to (4 + 1)/4.
    before, after = (1 / (1 + math.exp(-2 * mean)) for mean in (6 / 4, 5 / 4))
    found = scores(4, 2)
    assert found["Average Drop"] == pytest.approx((before - after) / before, rel=1e-4)
    assert found["Complexity"] == pytest.approx((1 + 0.5) / 4)


def test_the_shipped_classifier_knows_a_cat_normalised_as_it_was_trained(root):
    classifier = open_classifier("efficientnet_lite0")
    photo = read_image(root / "tests" / "data" / "chelsea.jpg")
    image = preprocess(photo, (224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    found = classifier.confidence(classifier.features(image))
    assert found[0].argmax().item() in range(281, 294)  # ImageNet's cats, domestic and wild
    weights = load(shipped_folder() / "efficientnet_lite0.safetensors")
    network = create("tf_efficientnet_lite0.in1k", weights=weights).eval()
    own = preprocess(photo, (224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.testing.assert_close(found, network(own).softmax(1), rtol=1e-3, atol=1e-5)


def test_a_folder_needs_photographs_and_other_files_may_lie_beside_them(tmp_path):
    (tmp_path / "README.txt").write_text("none yet", encoding="utf-8")
    config = EvaluationConfig(photos=tmp_path)
    with pytest.raises(ValueError, match=r"photos must hold photographs, .* has none"):
        open_photos(config)
    for name in ("a.png", "b.JPG"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    photos = open_photos(config)
    assert [path.name for path in photos.images] == ["a.png", "b.JPG"]
    assert len(list(measure_cam(photos, RED, [candidate("nearest")]))) == 2


def random_weights(name, *, pretrained, weights):
    return create(name, pretrained=False, weights=None)


@pytest.mark.parametrize("name", ["maskclip", "dinov2"])
def test_a_model_without_such_a_classifier_is_refused(name, monkeypatch):
    monkeypatch.setattr(cam, "create", random_weights)
    with pytest.raises(ValueError, match=rf"linear layer of its averaged features.*'{name}' does"):
        open_classifier(name)


def test_any_network_that_averages_its_features_will_do(monkeypatch):
    monkeypatch.setattr(cam, "create", random_weights)
    assert open_classifier("timm/resnet18").weight.shape == (1000, 512)
