"""The view error is zero for features that explain every view, and only for those."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from featup_hub.backbones import Backbone
from featup_hub.evaluation.candidates import Candidate, candidate
from featup_hub.evaluation.consistency import CONSISTENCY, consistency_sums


class MeanColour(Backbone):
    def __init__(self):
        super().__init__(feat_dim=3, patch_size=8)

    def features(self, image):
        return F.avg_pool2d(image, 8)


def measure(*candidates):
    coarse = torch.randn(6, 1, 3, 12, 12)
    photos = [F.interpolate(each, (64, 64), mode="bicubic") for each in coarse]
    found = {each.name: torch.zeros(2, dtype=torch.float64) for each in candidates}
    for name, sums in consistency_sums(photos[:4], photos[4:], MeanColour(), candidates):
        found[name] += sums["consistency"]
    return {name: CONSISTENCY[0].value(sums).item() for name, sums in found.items()}


def test_the_true_features_explain_every_view():
    truth = Candidate(name="truth", function=lambda source, image, size: image)
    found = measure(truth, candidate("bilinear"))
    assert found["truth"] < 1e-3
    assert found["bilinear"] > 10 * found["truth"]


def test_a_scale_that_a_downsampler_can_undo_is_not_punished():
    shrunk = Candidate(name="shrunk", function=lambda source, image, size: 0.8 * image)
    assert measure(shrunk)["shrunk"] < 1e-3


def test_features_that_know_nothing_explain_nothing():
    blank = Candidate(
        name="blank",
        function=lambda source, image, size: source.mean((2, 3), keepdim=True).expand(
            -1, -1, *size
        ),
    )
    assert measure(blank)["blank"] > 0.3
