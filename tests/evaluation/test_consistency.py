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


def measure(*candidates):
    coarse = torch.randn(6, 1, 3, 12, 12)
    photos = [F.interpolate(each, (64, 64), mode="bicubic") for each in coarse]
    found = {each.name: torch.zeros(2, dtype=torch.float64) for each in candidates}
    for name, sums in consistency_sums(photos[:4], photos[4:], MeanColour(8), candidates):
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


@pytest.mark.parametrize("stride", [12, 17, 20, 64])
def test_any_stride_is_measured(stride, tmp_path):
    for index in range(3):
        path = tmp_path / f"{index}.png"
        noise = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(index))
        big = F.interpolate(noise[None], (150, 180))[0].permute(1, 2, 0)
        Image.fromarray((255 * big).byte().numpy()).save(path)
    photos = Dataset(name="x/val", images=tuple(sorted(tmp_path.iterdir())))
    source = Source(name="colour", backbone=MeanColour(stride))
    bench = Bench(source=source, train=photos, val=photos, config=EvaluationConfig())
    truth = Candidate(name="truth", function=lambda source, image, size: image)
    [found] = measure_consistency(bench, [truth])
    sums = torch.stack(found.sums["truth"]["consistency"]).sum(0)
    assert CONSISTENCY[0].value(sums) < 1e-3


def test_a_channel_that_is_silent_in_the_first_photographs_does_not_decide():
    class Silent(MeanColour):
        def features(self, image):
            colours = super().features(image)
            return torch.cat([colours, (colours[:, :1] - 3).relu()], 1)

    dark = [F.interpolate(torch.rand(1, 3, 12, 12), (64, 64)) for _ in range(4)]
    bright = [F.interpolate(6 * torch.rand(1, 3, 12, 12), (64, 64)) for _ in range(2)]
    variation = [
        sum(
            float(sums["consistency"][1])
            for _, sums in consistency_sums(dark, bright, net, [candidate("bilinear")])
        )
        for net in (MeanColour(8), Silent(8))
    ]
    # It weighs as a channel of a hundredth of the others' deviation would, not as one of none.
    assert variation[1] < 1e5 * variation[0]


def test_features_that_know_nothing_explain_nothing():
    blank = Candidate(
        name="blank",
        function=lambda source, image, size: source.mean((2, 3), keepdim=True).expand(
            -1, -1, *size
        ),
    )
    assert measure(blank)["blank"] > 0.3
