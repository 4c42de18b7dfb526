"""The view error is zero for features that explain every view, and only for those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featup_hub.evaluation.candidates import Candidate, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.consistency import CONSISTENCY, consistency_sums, measure_consistency
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.features import Bench, Source
from tests.evaluation.conftest import MeanColour

(ERROR,) = CONSISTENCY


def upsampler(name, function):
    return Candidate(name=name, function=lambda source, image, size: function(source, image))


TRUTH = upsampler("truth", lambda source, image: image)


def test_features_that_explain_every_view_have_no_error_whatever_their_scale():
    # A downsampler can undo a scale.
    shrunk = upsampler("shrunk", lambda source, image: 0.8 * image)
    blank = upsampler(
        "blank", lambda source, image: source.mean((2, 3), keepdim=True).expand(-1, -1, 64, 64)
    )
    every = [TRUTH, shrunk, blank, candidate("bilinear")]
    coarse = torch.randn(6, 1, 3, 12, 12)
    photos = [F.interpolate(each, (64, 64), mode="bicubic") for each in coarse]
    sums = {each.name: torch.zeros(2, dtype=torch.float64) for each in every}
    for name, found in consistency_sums(photos[:4], photos[4:], MeanColour(8), every):
        sums[name] += found["consistency"]
    errors = {name: ERROR.value(total).item() for name, total in sums.items()}
    assert errors["truth"] < 1e-3
    assert errors["shrunk"] < 1e-3
    assert errors["bilinear"] > 10 * errors["truth"]
    assert errors["blank"] > 0.3


@pytest.mark.parametrize("stride", [12, 17, 20, 64])
def test_any_stride_is_measured(stride, tmp_path):
    for index in range(3):
        noise = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(index))
        big = F.interpolate(noise[None], (150, 180))[0].permute(1, 2, 0)
        Image.fromarray((255 * big).byte().numpy()).save(tmp_path / f"{index}.png")
    photos = Dataset(name="x/val", images=tuple(sorted(tmp_path.iterdir())))
    source = Source(name="colour", backbone=MeanColour(stride))
    bench = Bench(source=source, train=photos, val=photos, config=EvaluationConfig())
    (found,) = measure_consistency(bench, [TRUTH])
    assert ERROR.value(torch.stack(found.sums["truth"]["consistency"]).sum(0)) < 1e-3


def test_a_channel_that_is_silent_in_the_first_photographs_does_not_decide():
    class Silent(MeanColour):
        def features(self, image):
            colours = super().features(image)
            return torch.cat([colours, (colours[:, :1] - 3).relu()], 1)

    dark = [F.interpolate(torch.rand(1, 3, 12, 12), (64, 64)) for _ in range(4)]
    bright = [F.interpolate(6 * torch.rand(1, 3, 12, 12), (64, 64)) for _ in range(2)]
    plain = candidate("bilinear")
    usual, silent = (
        sum(float(s["consistency"][1]) for _, s in consistency_sums(dark, bright, net, [plain]))
        for net in (MeanColour(8), Silent(8))
    )
    # It weighs as a channel of a hundredth of the others' deviation would, not as one of none.
    assert silent < 1e5 * usual
