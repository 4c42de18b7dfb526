r"""Class activation maps: does an upsampled map show what a classifier looks at?

A classifier that averages its features over the image and applies a linear layer has the map
:math:`A_c(u) = \langle w_c, F(u) \rangle` for its class c. It is upsampled, cut at zero, scaled
to [0, 1] and multiplied with the normalised image; the classifier then sees the masked image.
With Y and O its confidence in c before and after:

* Average Drop: mean of max(0, Y - O) / Y; Average Increase: how often O > Y;
* Coherency: correlation of the masked image's map with the image's, mapped to [0, 1];
* Complexity: mean of the map;
* ADCC: harmonic mean of Coherency, 1 - Complexity and 1 - drop, per image, averaged.

The class is the one predicted for the whole image, so photographs need no labels.

Source: Chattopadhay et al., "Grad-CAM++", WACV 2018, for drop and increase; Poppi et al.,
"Revisiting The Evaluation of Class Activation Mapping for Explainability", CVPRW 2021, for the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featup_hub.backbones.timm import create
from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.folders import Folder
from featup_hub.evaluation.layouts import images_of
from featup_hub.evaluation.measurement import Measurement
from featup_hub.evaluation.statistics import Metric
from featup_hub.image import IMAGE_SUFFIXES, preprocess, read_image
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD, WeightFile, card
from featup_hub.weights import load

__all__ = [
    "CAM",
    "Classifier",
    "find_classifier",
    "measure_cam",
    "open_classifier",
    "open_network",
    "open_photos",
]

MIN_TERM = 1e-6


def measure_cam(config: EvaluationConfig, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Measures every upsampler on the photographs of a folder.

    Raises:
        ValueError: If there are none.
    """
    photos = open_photos(config)
    classifier = open_classifier(config.classifier)
    found = Measurement(
        protocol="class activation maps", data=photos.name, backbone=config.classifier
    )
    for path in photos.images:
        image = read_photo(path)
        for each in candidates:
            found.add(each.name, cam_sums(image, classifier, each))
    return [found]


def open_photos(config: EvaluationConfig) -> Folder:
    """Lists the photographs that are asked for; other files may lie beside them.

    Raises:
        ValueError: If there are none.
    """
    place = config.photos
    if place is None or not place.is_dir():
        raise ValueError(f"class activation maps need photos, a folder of photographs; got {place}")
    photos = tuple(images_of(place))
    if not photos:
        raise ValueError(
            f"class activation maps need photographs, {', '.join(sorted(IMAGE_SUFFIXES))}; "
            f"{place} has none; name the folder in which they lie"
        )
    return Folder(name=place.name, images=photos).spread(config.photo_images)


class Classifier(NamedTuple):
    """A classifier whose last two steps are an average over positions and a linear layer.

    Attributes:
        features: Normalised image (B, 3, H, W) -> (B, C, h, w).
        weight: Of the linear layer, (classes, C).
        bias: Of the linear layer, (classes,).
    """

    features: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor

    def confidence(self, features: Tensor) -> Tensor:
        """Returns the softmax over classes, (B, C, h, w) -> (B, classes)."""
        return (features.mean((2, 3)) @ self.weight.t() + self.bias).softmax(1)


def open_classifier(name: str) -> Classifier:
    """Loads a classifier, see :func:`open_network`."""
    network = open_network(name)
    layer = network.classifier
    return Classifier(network.forward_features, layer.weight, layer.bias)


def open_network(name: str) -> Any:
    """Loads a model of the table with its classifier.

    Args:
        name: A model's name, such as ``efficientnet_lite0``.

    Returns:
        The network, one of timm's.

    Raises:
        ValueError: If the model's file holds no classifier behind an average of features.
    """
    architecture, file = find_classifier(name)
    network, _ = create(architecture, load(file))
    return network.eval().requires_grad_(False)


def find_classifier(name: str) -> tuple[str, WeightFile]:
    """Returns what a classifier is called in timm, and what it is loaded from.

    Raises:
        ValueError: If there is no such model, or its file holds no classifier behind an average
            of features.
    """
    row = card(name)
    if row.backbone is None or row.backbone_file is None or not row.backbone.startswith("tf_eff"):
        raise ValueError(
            "a map of class activations needs a CNN with its classifier, such as "
            f"efficientnet_lite0; got {name!r}"
        )
    return row.backbone, row.backbone_file


def read_photo(path: Path, side: int = 224) -> Tensor:
    """Reads a photograph, its centre cut to a square, normalised, (1, 3, side, side)."""
    return preprocess(read_image(path), (side, side), mean=IMAGENET_MEAN, std=IMAGENET_STD)


@torch.inference_mode()
def cam_sums(image: Tensor, classifier: Classifier, upsampler: Candidate) -> dict[str, Tensor]:
    """Measures one upsampler on one photograph.

    Args:
        image: Normalised RGB, (1, 3, H, W).
        classifier: The classifier.
        upsampler: The upsampler.

    Returns:
        ``cam`` (6,): images, drop, increase, coherency, complexity, ADCC.
    """
    features = classifier.features(image)
    before = classifier.confidence(features)[0]
    best = before.argmax()
    weight = classifier.weight[best][None]
    shown = _map(upsampler, features, image, weight)
    masked = image * shown
    features = classifier.features(masked)
    after = classifier.confidence(features)[0, best]
    again = _map(upsampler, features, masked, weight)

    drop = (before[best] - after).clamp(min=0) / before[best]
    coherency = (_correlation(shown, again) + 1) / 2
    complexity = shown.mean()
    terms = torch.stack([coherency, 1 - complexity, 1 - drop]).clamp(min=MIN_TERM)
    increase = (after > before[best]).float()
    one = torch.ones(())
    adcc = 3 / (1 / terms).sum()
    return {"cam": torch.stack([one, drop, increase, coherency, complexity, adcc])}


def _map(upsampler: Candidate, features: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Returns the class's upsampled map, scaled to [0, 1], (1, 1, H, W)."""
    size = (image.shape[-2], image.shape[-1])
    raw = upsampler.project(features, image, size, weight).clamp(min=0)
    low, high = raw.aminmax()
    return (raw - low) / (high - low).clamp(min=MIN_TERM)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Pearson's coefficient of two maps, 0 where one of them is flat."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    norm = a.norm() * b.norm()
    return torch.where(norm > MIN_TERM, a @ b / norm.clamp(min=MIN_TERM), 0.0)


def _mean(index: int) -> Callable[[Tensor], Tensor]:
    return lambda sums: sums[..., index] / sums[..., 0]


CAM: Sequence[Metric] = (
    Metric(name="Average Drop", sums="cam", value=_mean(1), higher_is_better=False),
    Metric(name="Average Increase", sums="cam", value=_mean(2)),
    Metric(name="Coherency", sums="cam", value=_mean(3)),
    Metric(name="Complexity", sums="cam", value=_mean(4), higher_is_better=False),
    Metric(name="ADCC", sums="cam", value=_mean(5)),
)
