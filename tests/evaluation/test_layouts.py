"""Every layout, read from a tiny folder with the structure of its archive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from featup_hub.evaluation.layouts import open_data

LABELS = np.array([[0, 1, 2, 255, 7, 33]] * 4, dtype=np.uint8)
AS_STORED, ADE20K = [0, 1, 2, -1, 7, 33], [-1, 0, 1, -1, 6, 32]


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def photograph(path):
    save(path, np.full((4, 6, 3), 128, dtype=np.uint8))


@pytest.mark.parametrize(
    ("layout", "image", "labels", "expected", "classes"),
    [
        ("ade20k", "images/validation/A.jpg", "annotations/validation/A.png", ADE20K, 150),
        (
            *("cityscapes", "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png"),
            *("gtFine/val/ulm/ulm_1_gtFine_labelIds.png", [-1, -1, -1, -1, 0, 18], 19),
        ),
        ("coco-stuff", "images/val2017/1.jpg", "annotations/val2017/1.png", AS_STORED, 182),
        ("bsds", "images/1.jpg", "segments/1.png", AS_STORED, 50),
        ("davis", "images/bear/00001.jpg", "masks/bear/00001.png", [0, 1, -1, -1, -1, -1], 2),
        ("ccp", "val/images/images/1.b.jpg", "val/labels/images/1.b.png", AS_STORED, 59),
    ],
)
def test_labels_of_a_layout_become_classes_and_void(
    tmp_path, layout, image, labels, expected, classes
):
    photograph(tmp_path / image)
    photograph((tmp_path / image).with_name("._hidden.png"))
    save(tmp_path / labels, LABELS)
    data = open_data(f"{layout}:{tmp_path}", "val")
    assert (len(data), data.classes, data.name) == (1, classes, f"{layout}/val")
    sample = data[0]
    assert sample.labels[0].tolist() == expected
    assert sample.image.shape == (3, 4, 6)
    assert sample.depth is None


def test_voc_has_a_list_of_its_images_and_a_palette(tmp_path):
    for name in ("2007_1", "2007_2"):
        photograph(tmp_path / "JPEGImages" / f"{name}.jpg")
    picture = Image.fromarray(LABELS).convert("P")
    picture.putdata(LABELS.flatten().tolist())
    (tmp_path / "SegmentationClass").mkdir()
    picture.save(tmp_path / "SegmentationClass" / "2007_2.png")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_2\n")
    (sample,) = open_data(f"voc:{tmp_path}", "val")
    assert sample.labels[0].tolist() == [0, 1, 2, -1, 7, -1]


def test_nyuv2_depth_in_millimetres_becomes_metres(tmp_path):
    scene = tmp_path / "official_splits" / "test" / "kitchen"
    photograph(scene / "rgb_00045.jpg")
    save(scene / "sync_depth_00045.png", np.full((4, 6), 2500, dtype=np.uint16))
    (sample,) = open_data(f"nyuv2:{tmp_path}", "val")
    assert torch.equal(sample.depth, torch.full((4, 6), 2.5))
    assert sample.labels is None


def test_the_plain_layout_reads_labels_and_depth(splits):
    assert (len(splits[0]), splits[0].classes) == (4, 2)
    sample = splits[0][0]
    assert sample.labels[0, 19:21].tolist() == [0, 1]
    assert sample.depth[0, 19:21].tolist() == [1, 3]


@pytest.mark.parametrize("spec", ["pascal:x", "voc", "voc:"])
def test_an_unknown_layout_is_refused(spec):
    with pytest.raises(ValueError, match=r"data must be LAYOUT:FOLDER.*camvid.*got"):
        open_data(spec, "val")


def test_missing_images_labels_and_descriptions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images of the split 'val' in .*got none"):
        open_data(f"camvid:{tmp_path}", "val")
    photograph(tmp_path / "val" / "images" / "a.jpg")
    (tmp_path / "val" / "labels").mkdir()
    with pytest.raises(ValueError, match=r"a\.png is missing"):
        open_data(f"camvid:{tmp_path}", "val")
    with pytest.raises(ValueError, match=r"needs .*dataset\.json"):
        open_data(f"folder:{tmp_path}", "val")


def test_frames_of_a_clip_are_drawn_together(splits, tmp_path):
    photograph(tmp_path / "val" / "images" / "a.jpg")
    (tmp_path / "dataset.json").write_text('{"block": 4}', encoding="utf-8")
    blocks = [open_data(f"{x}:{tmp_path}", "val").block for x in ("camvid", "nyu", "folder")]
    assert [splits[1].block, *blocks] == [1, 17, 1, 4]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ('{"classes": 2.5}', r"dataset\.json must have .*; got classes = 2\.5"),
        ('{"block": 0}', r"must have whole numbers: .*block \(at least 1\).*; got block = 0"),
        ('{"depth_scale": 0}', r"depth_scale \(any number above 0\); got depth_scale = 0"),
        ('{"classses": 2}', r"must have .*; got classses = 2"),
        ("[1]", r"needs .*dataset\.json, such as"),
        ("{", r"needs .*dataset\.json, such as"),
        ("{}", r"labels need a number of classes, at least 1; .* gives 0"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(tmp_path, description, message):
    photograph(tmp_path / "val" / "images" / "a.jpg")
    save(tmp_path / "val" / "labels" / "a.png", LABELS)
    (tmp_path / "dataset.json").write_text(description, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_data(f"folder:{tmp_path}", "val")
