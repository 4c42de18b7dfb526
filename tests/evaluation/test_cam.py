"""Class activation maps of a classifier simple enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featup_hub.evaluation import cam
from featup_hub.evaluation.cam import (
    CAM,
    Classifier,
    cam_sums,
    measure_cam,
    open_classifier,
    open_photos,
)
from featup_hub.evaluation.candidates import candidate
from featup_hub.evaluation.config import EvaluationConfig


def scores(sums):
    return {metric.name: float(metric.value(sums["cam"])) for metric in CAM}


@pytest.fixture
def classifier():
    """Two classes, for and against red, averaged over 2×2 cells of 2×2 pixels."""
    return Classifier(
        features=lambda image: F.avg_pool2d(image[:, :1], 2),
        weight=torch.tensor([[1.0], [-1.0]]),
        bias=torch.zeros(2),
    )


def test_a_map_that_keeps_all_evidence_drops_nothing(classifier):
    image = torch.zeros(1, 3, 4, 4)
    image[..., :2, :2] = 4  # the mean is 1; outside the quadrant there is nothing to lose
    found = scores(cam_sums(image, classifier, candidate("nearest")))
    assert found["Average Drop"] == pytest.approx(0, abs=1e-6)
    assert found["Average Increase"] == 0
    assert found["Coherency"] == pytest.approx(1)
    assert found["Complexity"] == pytest.approx(1 / 4)
    assert found["ADCC"] == pytest.approx(3 / (1 + 4 / 3 + 1))


def test_masking_what_speaks_against_the_class_is_an_increase(classifier):
    image = torch.zeros(1, 3, 4, 4)
    image[..., :2, :2] = 4
    image[..., 2:, 2:] = -3.9
    found = scores(cam_sums(image, classifier, candidate("nearest")))
    assert found["Average Increase"] == 1
    assert found["Average Drop"] == 0


def test_the_drop_is_relative_to_the_confidence_before(classifier):
    image = torch.zeros(1, 3, 4, 4)
    image[..., :2, :2], image[..., 2:, 2:] = 4, 2
    # Scaled to [0, 1] the map is 1 and 1/2, so the mean falls from 3/2 to (4 + 1)/4.
    before, after = (1 / (1 + math.exp(-2 * mean)) for mean in (6 / 4, 5 / 4))
    found = scores(cam_sums(image, classifier, candidate("nearest")))
    assert found["Average Drop"] == pytest.approx((before - after) / before, rel=1e-4)
    assert found["Complexity"] == pytest.approx((1 + 0.5) / 4)


def test_the_shipped_classifier_knows_a_cat(root):
    classifier = open_classifier("efficientnet_lite0")
    with Image.open(root / "tests" / "data" / "chelsea.jpg") as picture:
        assert picture.mode == "RGB"
    config = EvaluationConfig(photos=root / "tests" / "data", photo_images=0)
    from featup_hub.evaluation.cam import read_photo

    image = read_photo(config.photos / "chelsea.jpg")
    best = classifier.confidence(classifier.features(image))[0].argmax().item()
    assert best in range(281, 294)  # ImageNet's cats, domestic and wild


def test_photographs_are_needed(tmp_path):
    with pytest.raises(ValueError, match="need photos, a folder of photographs; got None"):
        measure_cam(EvaluationConfig(), [candidate("nearest")])


def test_a_folder_without_photographs_is_refused(tmp_path):
    (tmp_path / "README.txt").write_text("none yet", encoding="utf-8")
    with pytest.raises(ValueError, match=r"need photographs, .jpeg, .jpg, .png; .* has none"):
        measure_cam(EvaluationConfig(photos=tmp_path), [candidate("nearest")])


def test_what_lies_beside_photographs_is_left_alone(classifier, monkeypatch, tmp_path):
    monkeypatch.setattr(cam, "open_classifier", lambda name: classifier)
    for name in ("a.png", "b.JPG"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    for name in ("README.txt", "._0.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no photograph")
    config = EvaluationConfig(photos=tmp_path)
    assert [path.name for path in open_photos(config).images] == ["a.png", "b.JPG"]
    (found,) = measure_cam(config, [candidate("nearest")])
    assert len(found.sums["nearest"]["cam"]) == 2


def test_a_model_without_such_a_classifier_is_refused():
    with pytest.raises(ValueError, match=r"needs a CNN with its classifier.*got 'dinov2'"):
        open_classifier("dinov2")
