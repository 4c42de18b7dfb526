"""Every layout, read from a tiny folder with the structure of its archive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from featup_hub.evaluation.layouts import open_data


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def photograph(path, size=(4, 6)):
    save(path, np.full((*size, 3), 128, dtype=np.uint8))


LABELS = np.array([[0, 1, 2, 255, 7, 33]] * 4, dtype=np.uint8)


def voc(root):
    for name in ("2007_1", "2007_2"):
        photograph(root / "JPEGImages" / f"{name}.jpg")
    picture = Image.fromarray(LABELS, mode=None).convert("P")
    picture.putdata(LABELS.flatten().tolist())
    (root / "SegmentationClass").mkdir()
    picture.save(root / "SegmentationClass" / "2007_2.png")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_2\n")
    return [0, 1, 2, -1, 7, -1], 21


def ade20k(root):
    photograph(root / "images" / "validation" / "ADE_val_1.jpg")
    save(root / "annotations" / "validation" / "ADE_val_1.png", LABELS)
    return [-1, 0, 1, -1, 6, 32], 150


def cityscapes(root):
    photograph(root / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png")
    save(root / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png", LABELS)
    return [-1, -1, -1, -1, 0, 18], 19


def coco_stuff(root):
    photograph(root / "images" / "val2017" / "000000000139.jpg")
    save(root / "annotations" / "val2017" / "000000000139.png", LABELS)
    return [0, 1, 2, -1, 7, 33], 182


@pytest.mark.parametrize(
    ("layout", "build"),
    [("voc", voc), ("ade20k", ade20k), ("cityscapes", cityscapes), ("coco-stuff", coco_stuff)],
)
def test_labels_of_a_layout_become_classes_and_void(tmp_path, layout, build):
    expected, classes = build(tmp_path)
    folder = open_data(f"{layout}:{tmp_path}", "val")
    assert len(folder) == 1
    assert folder.classes == classes
    assert folder.name == f"{layout}/val"
    sample = folder[0]
    assert sample.labels[0].tolist() == expected
    assert sample.image.shape == (3, 4, 6)
    assert sample.depth is None


def test_nyuv2_depth_in_millimetres_becomes_metres(tmp_path):
    scene = tmp_path / "official_splits" / "test" / "kitchen"
    photograph(scene / "rgb_00045.jpg")
    save(scene / "sync_depth_00045.png", np.full((4, 6), 2500, dtype=np.uint16))
    sample = open_data(f"nyuv2:{tmp_path}", "val")[0]
    assert torch.equal(sample.depth, torch.full((4, 6), 2.5))
    assert sample.labels is None


def test_the_plain_layout_reads_labels_and_depth(scenes):
    folder = open_data(f"folder:{scenes}", "train")
    assert (len(folder), folder.classes) == (4, 2)
    sample = folder[0]
    assert sample.labels[0, 19:21].tolist() == [0, 1]
    assert sample.depth[0, 19:21].tolist() == [1, 3]


@pytest.mark.parametrize("spec", ["pascal:x", "voc", "voc:"])
def test_an_unknown_layout_is_refused(spec):
    with pytest.raises(ValueError, match=r"data must be LAYOUT:FOLDER.*camvid.*got"):
        open_data(spec, "val")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images of the split 'val'.*found none"):
        open_data(f"camvid:{tmp_path}", "val")


def test_a_missing_label_is_named(tmp_path):
    photograph(tmp_path / "val" / "images" / "a.jpg")
    (tmp_path / "val" / "labels").mkdir()
    with pytest.raises(ValueError, match=r"a\.png is missing"):
        open_data(f"camvid:{tmp_path}", "val")


def test_the_plain_layout_needs_its_description(tmp_path):
    with pytest.raises(ValueError, match=r"needs .*dataset\.json"):
        open_data(f"folder:{tmp_path}", "val")


def test_frames_of_a_clip_are_drawn_together(scenes, tmp_path):
    assert open_data(f"folder:{scenes}", "val").block == 1
    photograph(tmp_path / "val" / "images" / "a.jpg")
    assert open_data(f"camvid:{tmp_path}", "val").block == 17
    assert open_data(f"nyu:{tmp_path}", "val").block == 1
    description = tmp_path / "dataset.json"
    description.write_text('{"block": 4}', encoding="utf-8")
    assert open_data(f"folder:{tmp_path}", "val").block == 4


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ('{"block": 0}', r"block in .*dataset\.json must be a whole number, at least 1; got 0"),
        ('{"classes": 2.5}', r"classes in .* must be a whole number, at least 0; got 2\.5"),
        ('{"depth_scale": 0}', r"depth_scale in .* must be a number above 0; got 0"),
        ('{"classses": 2}', r"a JSON object with classes, depth_scale, block; got classses"),
        ("[1]", r"a JSON object with classes, depth_scale, block; got list"),
        ("{", r"dataset\.json must be JSON"),
        ("{}", r"labels need a number of classes, at least 1; .* gives 0"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(tmp_path, description, message):
    photograph(tmp_path / "val" / "images" / "a.jpg")
    save(tmp_path / "val" / "labels" / "a.png", LABELS)
    (tmp_path / "dataset.json").write_text(description, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_data(f"folder:{tmp_path}", "val")


def test_hidden_files_are_no_images(tmp_path):
    for name in ("a.jpg", "._a.jpg"):
        photograph(tmp_path / "val" / "images" / name)
    assert [path.name for path in open_data(f"nyu:{tmp_path}", "val").images] == ["a.jpg"]


def test_hidden_files_of_cityscapes_are_no_images(tmp_path):
    cityscapes(tmp_path)
    photograph(tmp_path / "leftImg8bit" / "val" / "ulm" / "._ulm_1_leftImg8bit.png")
    photograph(tmp_path / "leftImg8bit" / "val" / ".ulm" / "ulm_1_leftImg8bit.png")
    (image,) = open_data(f"cityscapes:{tmp_path}", "val").images
    assert (image.parent.name, image.name) == ("ulm", "ulm_1_leftImg8bit.png")


@pytest.mark.shared
def test_the_shared_sets_open_with_every_image(shared):
    counts = {
        (name, split): len(open_data(f"{name}:{shared / 'data' / name}", split))
        for name in ("camvid", "nyu", "ccp", "bsds", "davis")
        for split in ("train", "val")
    }
    assert list(counts.values()) == [367, 101, 400, 100, 200, 100, 120, 120, 60, 60]
