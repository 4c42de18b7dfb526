r"""Class activation maps: does an upsampled map show what a classifier looks at?

A classifier that averages its features over the image and applies a linear layer has the map
:math:`A_c(u) = \langle w_c, F(u) \rangle` for its class c. The map is upsampled, clamped at zero,
scaled to [0, 1] and multiplied with the normalised image. The classifier then sees the masked
image. With Y and O its confidence in c before and after:

* Average Drop: mean of max(0, Y - O) / Y; Average Increase: how often O > Y;
* Coherency: correlation of the masked image's map with the image's, mapped to [0, 1];
* Complexity: mean of the map;
* ADCC: harmonic mean of Coherency, 1 - Complexity and 1 - drop, per image, averaged.

c is the class predicted for the whole image, so photographs need no labels.

Source: Chattopadhay et al., "Grad-CAM++", WACV 2018, for drop and increase; Poppi et al.,
"Revisiting The Evaluation of Class Activation Mapping for Explainability", CVPRW 2021, for the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featup_hub.backbones import create
from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.sums import Results
from featup_hub.image import list_images, normalise_values, preprocess
from featup_hub.loading import find_card
from featup_hub.pixels import read_image
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD
from featup_hub.weights import load

MIN_TERM = 1e-6


def measure_cam(
    photos: Dataset, classifier: Classifier, candidates: Sequence[Candidate]
) -> Results:
    """Measures every upsampler on photographs."""
    for path in photos.images:
        image = preprocess(read_image(path), (224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)
        for each in candidates:
            yield "class activation maps", each.name, cam_sums(image, classifier, each)


def open_photos(config: EvaluationConfig) -> Dataset:
    """Lists the photographs of a folder; raises ValueError if it has none."""
    place = config.photos
    if place is None or not place.is_dir():
        raise ValueError(f"photos must be given, a folder of photographs, for cam; got {place}")
    photos = tuple(list_images(place))
    if not photos:
        raise ValueError(f"photos must hold photographs, for cam; {place} has none")
    return Dataset(name=place.name, images=photos).spread(config.photo_images)


class Classifier(NamedTuple):
    """A classifier whose last two steps are an average over positions and a linear layer."""

    features: Callable[[Tensor], Tensor]  # image in ImageNet's normalisation -> (B, C, h, w)
    weight: Tensor  # (classes, C)
    bias: Tensor  # (classes,)

    def confidence(self, features: Tensor) -> Tensor:
        """Returns the softmax over classes, (B, C, h, w) -> (B, classes)."""
        return (features.mean((2, 3)) @ self.weight.t() + self.bias).softmax(1)


def open_classifier(name: str) -> Classifier:
    """Loads a model that :func:`featup_hub.load` knows, with its classifier."""
    refusal = ValueError(
        "class activation maps need a model that classifies by a linear layer of its averaged "
        f"features, such as efficientnet_lite0; {name!r} does not; choose another"
    )
    row = find_card(name)
    if row.kind != "timm":
        raise refusal
    shipped = None if row.file is None else load(row.file)
    network = create(row.backbone, pretrained=True, weights=shipped)
    network.eval().requires_grad_(False)
    config, layer = network.pretrained_cfg, network.get_classifier()
    if not isinstance(layer, nn.Linear):
        raise refusal

    def native(image: Tensor) -> Tensor:
        """Converts ImageNet's normalisation to the network's own."""
        mean, std = (image.new_tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        return normalise_values(image * std + mean, config["mean"], config["std"])

    classifier = Classifier(
        lambda image: network.forward_features(native(image)), layer.weight, layer.bias
    )
    with torch.inference_mode():
        image = torch.linspace(-2, 2, 3 * 224 * 224).view(1, 3, 224, 224)
        features = classifier.features(image)
        averaged = features.dim() == 4 and features.shape[1] == layer.in_features
        if not averaged or not torch.allclose(
            classifier.confidence(features), network(native(image)).softmax(1), atol=1e-4
        ):
            raise refusal
    return classifier


@torch.inference_mode()
def cam_sums(image: Tensor, classifier: Classifier, upsampler: Candidate) -> dict[str, Tensor]:
    """Measures one upsampler on one photograph, normalised RGB, (1, 3, H, W).

    ``cam`` (6,) is: images, drop, increase, coherency, complexity, ADCC.
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
    adcc = 3 / (1 / terms).sum()
    one = torch.ones(())
    return {"cam": torch.stack([one, drop, increase, coherency, complexity, adcc])}


def _map(upsampler: Candidate, features: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Returns the class's upsampled map, scaled to [0, 1], (1, 1, H, W)."""
    size = (image.shape[-2], image.shape[-1])
    raw = upsampler.project(features, image, size, weight).clamp(min=0)
    low, high = raw.aminmax()
    return (raw - low) / (high - low).clamp(min=MIN_TERM)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Pearson's coefficient of two maps, 0 if one of them is flat."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    norm = a.norm() * b.norm()
    return torch.where(norm > MIN_TERM, a @ b / norm.clamp(min=MIN_TERM), 0.0)
