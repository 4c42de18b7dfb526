"""Samples: cropping to a stride, shrinking, selection, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featup_hub.evaluation.dataset import Dataset, Sample


def sample(height, width):
    grid = torch.arange(height * width).reshape(height, width)
    return Sample(name="a", image=torch.rand(3, height, width), labels=grid, depth=grid.float())


def test_a_crop_is_the_centre_and_keeps_truth_beside_its_pixels():
    whole = sample(37, 50)
    cut = whole.crop(16)
    assert torch.equal(cut.image, whole.image[:, 2:34, 1:49])
    assert torch.equal(cut.labels, whole.labels[2:34, 1:49])
    assert torch.equal(cut.depth, whole.depth[2:34, 1:49])
    assert torch.equal(cut.crop(16).image, cut.image)


def test_an_image_below_one_cell_is_refused():
    with pytest.raises(ValueError, match="at least one 16×16 cell; 'a' is 10×50"):
        sample(10, 50).crop(16)


def test_shrinking_keeps_labels_labels_and_small_images_whole():
    whole = sample(30, 60)
    small = whole.shrink(20)
    assert small.image.shape == (3, 10, 20)
    assert torch.equal(small.labels, whole.labels[1::3, 1::3])
    assert torch.equal(small.depth, whole.depth[1::3, 1::3])
    assert whole.shrink(60) is whole
    assert whole.shrink(0) is whole


def test_the_normalised_image_is_imagenet_s():
    grey = Sample(name="a", image=torch.full((3, 2, 2), 0.5)).normalised()
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(grey[0, :, 0, 0], expected)


def test_spread_takes_first_and_last_and_evenly_between(tmp_path):
    files = tuple(tmp_path / f"{i}.png" for i in range(9))
    folder = Dataset(name="x", images=files, labels=files)
    assert [p.stem for p in folder.spread(3).images] == ["0", "4", "8"]
    assert folder.spread(3).labels == folder.spread(3).images
    assert replace(folder, block=6).spread(3).block == 2
    assert replace(folder, block=2).spread(3).block == 1
    assert folder.spread(0) == folder.spread(20) == folder


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 5), r"labels of .* must have the image's size.*\(4, 5\)"),
        ((4, 4, 3), r"stored as one channel.*convert colours"),
    ],
)
def test_labels_of_another_size_or_stored_as_colours_are_refused(tmp_path, shape, message):
    for name, size in (("a", (4, 4, 3)), ("b", shape)):
        Image.fromarray(np.zeros(size, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    images, labels = (tmp_path / "a.png",), (tmp_path / "b.png",)
    with pytest.raises(ValueError, match=message):
        Dataset(name="x", images=images, labels=labels, classes=2)[0]
