"""The view error is zero for features that explain every view, and only for those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featup_hub.evaluation.candidates import Candidate, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.consistency import measure_consistency
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.features import Bench, Source
from featup_hub.evaluation.scores import METRICS
from tests.evaluation.conftest import MeanColour

(ERROR,) = (metric for metric in METRICS if metric.sums == "consistency")


def photographs(folder, *, count, brightest=1.0):
    """Smooth noise."""
    folder.mkdir()
    for index in range(count):
        noise = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(index))
        big = F.interpolate(brightest * noise, (150, 180), mode="bilinear")[0].permute(1, 2, 0)
        Image.fromarray((255 * big).byte().numpy()).save(folder / f"{index}.png")
    return Dataset(name="x/val", images=tuple(sorted(folder.iterdir())))


def measured(train, val, backbone, *candidates):
    """Adds up the sums of every upsampler."""
    source, sums = Source(name="colour", backbone=backbone), {}
    bench = Bench(source=source, train=train, val=val, config=EvaluationConfig())
    for _, name, found in measure_consistency(bench, candidates):
        sums[name] = sums.get(name, 0) + found["consistency"]
    return sums


def upsampler(name, function):
    return Candidate(name=name, function=lambda source, image, size: function(source, image))


TRUTH = upsampler("truth", lambda source, image: image)


@pytest.mark.parametrize("stride", [12, 17, 64])
def test_features_that_explain_every_view_have_no_error_whatever_their_scale(stride, tmp_path):
    photos = photographs(tmp_path / "photos", count=4)
    # A downsampler can undo a scale.
    shrunk = upsampler("shrunk", lambda source, image: 0.8 * image)
    blank = upsampler(
        "blank", lambda source, image: source.mean((2, 3), keepdim=True).expand(image.shape)
    )
    every = [TRUTH, shrunk, blank, candidate("bilinear")]
    sums = measured(photos, photos, MeanColour(stride), *every)
    errors = {name: ERROR.value(total).item() for name, total in sums.items()}
    assert max(errors["truth"], errors["shrunk"]) < 1e-3
    assert errors["bilinear"] > 10 * errors["truth"]
    assert errors["blank"] > 0.3


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_photographs_have_the_size_that_a_backbone_of_fixed_size_sees(size, tmp_path):
    photos, backbone = photographs(tmp_path / "photos", count=3), MeanColour(16)
    backbone.fixed_size = size
    (error, variation) = measured(photos, photos, backbone, TRUTH)["truth"]
    assert error < 1e-3 * variation


def test_a_channel_that_is_silent_in_the_first_photographs_does_not_decide(tmp_path):
    class Silent(MeanColour):
        def features(self, image):
            colours = super().features(image)
            return torch.cat([colours, (colours[:, :1] - 1).relu()], 1)

    dark = photographs(tmp_path / "dark", count=4, brightest=0.5)
    bright = photographs(tmp_path / "bright", count=2)
    usual, silent = (
        float(measured(dark, bright, net, candidate("bilinear"))["bilinear"][1])
        for net in (MeanColour(8), Silent(8))
    )
    # It weighs as a channel of a hundredth of the others' deviation would, not as one of none.
    assert silent < 1e5 * usual
