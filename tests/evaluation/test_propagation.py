"""Propagation: labels follow similar features within a window."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featup_hub.evaluation.candidates import Candidate, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.features import Source
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.propagation import propagate
from featup_hub.evaluation.report import rows
from featup_hub.evaluation.run import measure
from tests.evaluation.conftest import MeanColour


def unit(height, width):
    """Features of which no two places are alike."""
    return F.normalize(torch.randn(64, height, width), dim=0)


def test_labels_move_with_their_features_within_a_window():
    first = unit(12, 20)
    labels = (torch.rand(2, 12, 20) > 0.5).float()
    found = propagate(first, labels, first.roll(3, 2), radius=6)
    # Beyond the seam the place that moved is outside the window.
    torch.testing.assert_close(found[..., 3:], labels.roll(3, 2)[..., 3:], atol=0.01, rtol=0)
    labels = torch.zeros(1, 12, 20)
    labels[..., :8] = 1
    # What moved eight places is beyond two: only labels of the neighbourhood are taken.
    assert propagate(first, labels, first.roll(8, 2), radius=2)[..., 10:].max() == 0


def test_the_seven_most_alike_places_count_by_a_softmax():
    generator = torch.Generator().manual_seed(1)
    first = F.normalize(torch.randn(4, 3, 5, generator=generator), dim=0)
    labels = torch.rand(2, 3, 5, generator=generator)
    found = propagate(first, labels, first, radius=10)
    similar = first.flatten(1).t() @ first.flatten(1)
    best, index = similar.topk(7)
    weights = (best / 0.07).softmax(1)
    expected = (labels.flatten(1)[:, index] * weights).sum(2).view(2, 3, 5)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def video(tmp_path):
    """A bright square that moves by 16 pixels a frame over a dark gradient."""
    for frame in range(3):
        object_ = np.zeros((64, 96), dtype=bool)
        object_[16:48, 16 + 16 * frame : 48 + 16 * frame] = True
        shades = np.where(object_, 230, np.arange(96)[None] // 2)
        for kind, values in (("images", shades[..., None].repeat(3, 2)), ("masks", object_)):
            path = tmp_path / kind / "square" / f"{frame}.{'jpg' if kind == 'images' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    return open_data(f"davis:{tmp_path}", "val")


SOURCE = Source(name="colour", backbone=MeanColour())


def test_exact_features_carry_the_mask_and_coarse_ones_blur_it(video):
    exact = Candidate(
        name="exact", function=lambda source, image, size: F.interpolate(image, size, mode="area")
    )
    config = EvaluationConfig(protocols=("propagation",))
    measured = measure([(video, video)], [SOURCE], [exact, candidate("bilinear")], config)
    found = {
        (row.upsampler, row.metric): row.score.value
        for row in rows(measured, versus=(), resamples=20)
    }
    assert found["exact", "J"] > 0.95
    assert found["exact", "boundary accuracy"] > found["bilinear", "boundary accuracy"]


def test_a_video_is_one_folder_and_its_first_frame_is_not_scored(video):
    assert (len(video), len(video.videos())) == (3, 1)
    config = EvaluationConfig(protocols=("propagation",), val_images=1)
    (found,) = measure([(video, video)], [SOURCE], [candidate("bilinear")], config)
    assert len(found.sums["bilinear"]["jaccard"]) == 2


def test_videos_of_one_frame_each_are_refused_and_left_out_beside_longer_ones(video):
    config = EvaluationConfig(protocols=("propagation",))
    with pytest.raises(ValueError, match=r"a folder of two frames or more; .* one image a folder"):
        measure([(video, video._only([0]))] * 2, [SOURCE], [candidate("bilinear")], config)
    elsewhere = replace(video, images=(video.images[0].parent / "../x.jpg", *video.images[1:]))
    assert [len(each) for each in elsewhere.videos()] == [2]
