"""Layouts of data sets on disk, opened by ``LAYOUT:FOLDER``.

``folder`` is the plain layout for data of your own. Files are paired by their stem::

    FOLDER/{train,val}/images/NAME.jpg
    FOLDER/{train,val}/labels/NAME.png   classes 0 .. classes-1, other values are void
    FOLDER/{train,val}/depth/NAME.png    metres times depth_scale, 0 where missing
    FOLDER/dataset.json                  {"classes": 11, "depth_scale": 25.5, "block": 1}

``block`` is the number of neighbouring images that are correlated, such as frames of a clip; the
bootstrap draws them together. The other layouts are the rows of :data:`LAYOUTS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from featup_hub.evaluation.dataset import Dataset
from featup_hub.image import list_images


class Layout(NamedTuple):
    """Where a data set keeps its files; ``{split}`` stands for the data set's name of the split."""

    images: str  # folder of the images, searched with its subfolders
    labels: str = ""  # folder of PNGs with the images' paths; empty if there are none
    depth: str = ""  # the same for depth
    # Text of an image's name, and of its truth's in that place. Files without it are no images.
    swap: tuple[str, str] = ("", "")
    listing: str = ""  # text file with the stems of a split's images; empty takes all images
    splits: tuple[str, str] = ("train", "val")  # the data set's own names of these
    values: Mapping[str, Any] = {}  # fields of Dataset that say how to read labels and depth


_PLAIN = Layout("{split}/images", "{split}/labels", "{split}/depth")
# Cityscapes evaluates 19 of its 34 identifiers.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_MAP = tuple(_CITYSCAPES.index(i) if i in _CITYSCAPES else -1 for i in range(34))

LAYOUTS = {
    "folder": _PLAIN,
    # The validation split is one clip at 15 Hz: differences between upsamplers are correlated
    # over about ten images if 60 of the 101 are scored.
    "camvid": _PLAIN._replace(values={"classes": 11, "block": 17}),
    "ccp": _PLAIN._replace(values={"classes": 59}),
    "nyu": _PLAIN._replace(values={"classes": 39, "depth_scale": 25.5}),
    "bsds": Layout("images", "segments", values={"classes": 50}),
    "davis": Layout("images", "masks", values={"classes": 2, "block": 6}),
    "voc": Layout(  # VOCdevkit/VOC2012
        "JPEGImages",
        "SegmentationClass",
        listing="ImageSets/Segmentation/{split}.txt",
        values={"classes": 21},
    ),
    "ade20k": Layout(  # ADEChallengeData2016
        "images/{split}",
        "annotations/{split}",
        splits=("training", "validation"),
        values={"classes": 150, "label_map": (-1, *range(150))},
    ),
    "cityscapes": Layout(
        "leftImg8bit/{split}",
        "gtFine/{split}",
        swap=("_leftImg8bit", "_gtFine_labelIds"),
        values={"classes": 19, "label_map": _CITYSCAPES_MAP},
    ),
    "coco-stuff": Layout(
        "images/{split}",
        "annotations/{split}",
        splits=("train2017", "val2017"),
        values={"classes": 182},
    ),
    "nyuv2": Layout(  # scene folders with depth in millimetres
        "official_splits/{split}",
        depth="official_splits/{split}",
        swap=("rgb_", "sync_depth_"),
        splits=("train", "test"),
        values={"depth_scale": 1000},
    ),
}


def open_data(spec: str, split: Literal["train", "val"], *, max_side: int = 0) -> Dataset:
    """Opens one split of a data set.

    Args:
        spec: ``LAYOUT:FOLDER``.
        split: The split; a layout without splits gives all its images for each.
        max_side: Images with a longer side are resized to it; 0 keeps every image as it is.

    Raises:
        ValueError: If the layout is unknown, there are no images, the truth of some is missing,
            or ``dataset.json`` is wrong.
    """
    name, _, place = spec.partition(":")
    if name not in LAYOUTS or not place:
        raise ValueError(
            f"data must be LAYOUT:FOLDER with one of the layouts {', '.join(LAYOUTS)}; got {spec!r}"
        )
    layout, root = LAYOUTS[name], Path(place)
    values = layout.values
    if name == "folder":
        values, name = _described(root / "dataset.json"), root.name
    own_name = layout.splits[split == "val"]
    folder = root / layout.images.format(split=own_name)
    images = list_images(folder) if folder.is_dir() and not layout.listing else []
    if layout.listing:
        listing = root / layout.listing.format(split=own_name)
        stems = listing.read_text(encoding="utf-8").split() if listing.is_file() else []
        images = [folder / f"{stem}.jpg" for stem in stems]
    images = [path for path in images if layout.swap[0] in path.name]
    if not images:
        raise ValueError(f"{spec!r} must hold images of the split {split!r} in {folder}; got none")
    truth: dict[str, Any] = {}
    for kind in ("labels", "depth"):
        there = root / getattr(layout, kind).format(split=own_name)
        if getattr(layout, kind) and there.is_dir():
            stems = [path.relative_to(folder).with_suffix("").as_posix() for path in images]
            truth[kind] = tuple(there / f"{stem.replace(*layout.swap)}.png" for stem in stems)
            if missing := [path for path in truth[kind] if not path.is_file()]:
                raise ValueError(
                    f"every image of {spec!r} must have its truth; {missing[0]} is missing; "
                    "remove the image or add the file"
                )
    found = Dataset(
        name=f"{name}/{split}", images=tuple(images), max_side=max_side, **truth, **values
    )
    if found.labels and found.classes < 1:
        raise ValueError(
            f"labels need a number of classes, at least 1; {spec!r} gives {found.classes}; write "
            'it into dataset.json, such as {"classes": 11}'
        )
    return found


def _described(path: Path) -> dict[str, Any]:
    """Reads the numbers of a data set of the plain layout."""
    least = {"classes": 0, "depth_scale": 1e-9, "block": 1}
    try:
        described = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f'the plain layout needs {path}, such as {{"classes": 11, "depth_scale": 1000}}; '
            f"got {error}"
        ) from error
    for name, value in described.items():
        whole = type(value) is int or (name == "depth_scale" and type(value) is float)
        if name not in least or not whole or not least[name] <= value < math.inf:
            raise ValueError(
                f"{path} must have whole numbers: classes, block (at least 1), depth_scale (any "
                f"number above 0); got {name} = {value!r}"
            )
    return described
