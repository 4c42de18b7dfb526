"""Labelled data sets as they lie on people's disks.

``LAYOUT:FOLDER`` opens one. ``folder`` is the plain layout, with files paired by their stem::

    FOLDER/{train,val}/images/NAME.jpg
    FOLDER/{train,val}/labels/NAME.png   classes 0 .. classes-1, other values are void
    FOLDER/{train,val}/depth/NAME.png    metres times depth_scale, 0 where missing
    FOLDER/dataset.json                  {"classes": 11, "depth_scale": 25.5, "block": 1}

``block`` says how many neighbouring images are alike, as frames of a clip are: intervals are drawn
in such blocks. ``camvid`` and ``nyu`` are that layout with these numbers known. The others are the
layouts of the data sets' own archives: ``voc`` (VOCdevkit/VOC2012), ``ade20k``
(ADEChallengeData2016), ``cityscapes`` (leftImg8bit and gtFine beside each other, 19 classes),
``coco-stuff`` (images and pixel maps beside each other, all 182 numbers), ``nyuv2`` (depth in the
widespread layout of scene folders with rgb_*.jpg and sync_depth_*.png in millimetres, below
official_splits).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from featup_hub.evaluation.folders import Folder
from featup_hub.image import list_images

__all__ = ["LAYOUTS", "images_of", "layout_and_root", "open_data"]

Split = Literal["train", "val"]

# Stored identifier -> one of the 19 classes that are evaluated; the others are void.
CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Files(NamedTuple):
    """What a layout finds for a split: files, and how their values are to be read."""

    images: Sequence[Path]
    labels: Sequence[Path] = ()
    depth: Sequence[Path] = ()
    classes: int = 0
    label_map: tuple[int, ...] = ()
    depth_scale: float = 1.0
    block: int = 1


def open_data(spec: str, split: Split, *, max_side: int = 0) -> Folder:
    """Opens one split of a data set.

    Args:
        spec: ``LAYOUT:FOLDER``.
        split: Which part; layouts that call it otherwise are asked by their own name.
        max_side: Longer images are shrunk to this side; 0 leaves all as they are.

    Returns:
        The split.

    Raises:
        ValueError: If the layout is unknown, there are no images, truth is missing for some, or
            what describes it does not hold.
    """
    layout, root = layout_and_root(spec)
    found = LAYOUTS[layout](Path(root), split)
    if not found.images:
        raise ValueError(
            f"{spec!r} must hold images of the split {split!r} in {layout}'s layout; found none"
        )
    if found.labels and found.classes < 1:
        raise ValueError(
            f"labels need a number of classes, at least 1; {spec!r} gives {found.classes}; write "
            'it into dataset.json, such as {"classes": 11}'
        )
    for path in (*found.labels, *found.depth):
        if not path.is_file():
            raise ValueError(
                f"every image of {spec!r} must have its truth; {path} is missing; "
                "remove the image or add the file"
            )
    name = Path(root).name if layout == "folder" else layout
    return Folder(
        name=f"{name}/{split}",
        images=tuple(found.images),
        labels=tuple(found.labels),
        depth=tuple(found.depth),
        classes=found.classes,
        label_map=found.label_map,
        depth_scale=found.depth_scale,
        max_side=max_side,
        block=found.block,
    )


def layout_and_root(spec: str) -> tuple[str, str]:
    """Splits ``LAYOUT:FOLDER``.

    Raises:
        ValueError: If it is something else, or the layout is unknown.
    """
    layout, _, root = spec.partition(":")
    if layout not in LAYOUTS or not root:
        raise ValueError(
            f"data must be LAYOUT:FOLDER with one of the layouts {', '.join(LAYOUTS)}; got {spec!r}"
        )
    return layout, root


def _plain(root: Path, split: Split, classes: int, depth_scale: float) -> Files:
    images = images_of(root / split / "images")
    labels, depth = (
        [folder / f"{image.stem}.png" for image in images] if folder.is_dir() else []
        for folder in (root / split / "labels", root / split / "depth")
    )
    return Files(images, labels, depth, classes=classes, depth_scale=depth_scale)


def _folder(root: Path, split: Split) -> Files:
    description = root / "dataset.json"
    if not description.is_file():
        raise ValueError(
            f'the plain layout needs {description}, such as {{"classes": 11, "depth_scale": 1000}}'
        )
    values = _description(description)
    plain = _plain(root, split, int(values["classes"]), values["depth_scale"])
    return plain._replace(block=int(values["block"]))


def _description(path: Path) -> dict[str, float]:
    """Reads the numbers of a data set, with their defaults."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}") from error
    values = {"classes": 0, "depth_scale": 1.0, "block": 1}
    if not isinstance(found, dict) or not set(found) <= set(values):
        got = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} must be a JSON object with {', '.join(values)}; got {got}")
    values |= found
    for name, least in (("classes", 0), ("block", 1)):
        if type(values[name]) is not int or values[name] < least:
            raise ValueError(
                f"{name} in {path} must be a whole number, at least {least}; got {values[name]!r}"
            )
    scale = values["depth_scale"]
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):
        raise ValueError(f"depth_scale in {path} must be a number above 0; got {scale!r}")
    return values


def _camvid(root: Path, split: Split) -> Files:
    # Its val split is one clip at 15 Hz: differences of upsamplers are correlated over about ten
    # images where every 1.7th is scored.
    return _plain(root, split, classes=11, depth_scale=1)._replace(block=17)


def _nyu(root: Path, split: Split) -> Files:
    return _plain(root, split, classes=39, depth_scale=25.5)


def _voc(root: Path, split: Split) -> Files:
    index = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = index.read_text(encoding="utf-8").split() if index.is_file() else []
    return Files(
        [root / "JPEGImages" / f"{name}.jpg" for name in names],
        [root / "SegmentationClass" / f"{name}.png" for name in names],
        classes=21,
    )


def _ade20k(root: Path, split: Split) -> Files:
    part = {"train": "training", "val": "validation"}[split]
    images = images_of(root / "images" / part)
    labels = [root / "annotations" / part / f"{image.stem}.png" for image in images]
    return Files(images, labels, classes=150, label_map=(-1, *range(150)))


def _cityscapes(root: Path, split: Split) -> Files:
    images = sorted((root / "leftImg8bit" / split).glob("[!.]*/[!.]*_leftImg8bit.png"))
    labels = [
        root
        / "gtFine"
        / split
        / image.parent.name
        / image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        for image in images
    ]
    label_map = tuple(CITYSCAPES.index(i) if i in CITYSCAPES else -1 for i in range(34))
    return Files(images, labels, classes=19, label_map=label_map)


def _coco_stuff(root: Path, split: Split) -> Files:
    images = images_of(root / "images" / f"{split}2017")
    labels = [root / "annotations" / f"{split}2017" / f"{image.stem}.png" for image in images]
    return Files(images, labels, classes=182)


def _nyuv2(root: Path, split: Split) -> Files:
    part = {"train": "train", "val": "test"}[split]
    images = sorted((root / "official_splits" / part).glob("*/rgb_*.jpg"))
    depth = [
        image.with_name(image.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
        for image in images
    ]
    return Files(images, depth=depth, depth_scale=1000)


def images_of(folder: Path) -> list[Path]:
    """Lists the images in a folder, see :func:`list_images`; none where there is no folder."""
    return list_images(folder) if folder.is_dir() else []


LAYOUTS: dict[str, Callable[[Path, Split], Files]] = {
    "folder": _folder,
    "camvid": _camvid,
    "nyu": _nyu,
    "voc": _voc,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "coco-stuff": _coco_stuff,
    "nyuv2": _nyuv2,
}
