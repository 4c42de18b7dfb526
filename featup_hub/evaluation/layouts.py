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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from featup_hub.evaluation.dataset import Dataset
from featup_hub.image import list_images

__all__ = ["LAYOUTS", "Layout", "open_data"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set keeps its files, and how to read their values.

    Attributes:
        images: Folder of the images, searched with its subfolders; ``{split}`` is the split.
        prefix: Beginning of the names of images; other files of the folder are ignored.
        labels: How to make a label file's path of its image's: text to replace, each once. The
            suffix becomes ``.png``. Empty if there are no labels.
        depth: The same for depth files.
        index: Text file that lists the stems of a split's images; empty takes all images.
        train: The data set's own name of the split ``train``.
        val: The data set's own name of the split ``val``.
        classes: Number of classes.
        label_map: Class of every stored value, if they differ; other values are void.
        depth_scale: Stored depth per metre.
        block: Number of neighbouring images that are correlated.
    """

    images: str = "{split}/images"
    prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: {"/images/": "/labels/"})
    depth: Mapping[str, str] = field(default_factory=lambda: {"/images/": "/depth/"})
    index: str = ""
    train: str = "train"
    val: str = "val"
    classes: int = 0
    label_map: tuple[int, ...] = ()
    depth_scale: float = 1.0
    block: int = 1


# Cityscapes evaluates 19 of its 34 identifiers.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

LAYOUTS = {
    "folder": Layout(),
    # The validation split is one clip at 15 Hz: differences between upsamplers are correlated
    # over about ten images if 60 of the 101 are scored.
    "camvid": Layout(classes=11, block=17),
    "ccp": Layout(classes=59),
    "nyu": Layout(classes=39, depth_scale=25.5),
    "bsds": Layout(images="images", labels={"/images/": "/segments/"}, depth={}, classes=50),
    "davis": Layout(images="images", labels={"/images/": "/masks/"}, depth={}, classes=2, block=6),
    "voc": Layout(  # VOCdevkit/VOC2012
        images="JPEGImages",
        labels={"/JPEGImages/": "/SegmentationClass/"},
        depth={},
        index="ImageSets/Segmentation/{split}.txt",
        classes=21,
    ),
    "ade20k": Layout(  # ADEChallengeData2016
        images="images/{split}",
        labels={"/images/": "/annotations/"},
        depth={},
        train="training",
        val="validation",
        classes=150,
        label_map=(-1, *range(150)),
    ),
    "cityscapes": Layout(
        images="leftImg8bit/{split}",
        labels={"/leftImg8bit/": "/gtFine/", "_leftImg8bit": "_gtFine_labelIds"},
        depth={},
        classes=19,
        label_map=tuple(_CITYSCAPES.index(i) if i in _CITYSCAPES else -1 for i in range(34)),
    ),
    "coco-stuff": Layout(
        images="images/{split}",
        labels={"/images/": "/annotations/"},
        depth={},
        train="train2017",
        val="val2017",
        classes=182,
    ),
    "nyuv2": Layout(  # scene folders with depth in millimetres
        images="official_splits/{split}",
        prefix="rgb_",
        labels={},
        depth={"/rgb_": "/sync_depth_"},
        val="test",
        depth_scale=1000,
    ),
}


def open_data(spec: str, split: Literal["train", "val"], *, max_side: int = 0) -> Dataset:
    """Opens one split of a data set.

    Args:
        spec: ``LAYOUT:FOLDER``.
        split: The split; a layout without splits gives all its images for each.
        max_side: Images with a longer side are resized to it; 0 keeps every image as it is.

    Returns:
        The split.

    Raises:
        ValueError: If the layout is unknown, there are no images, the truth of some is missing,
            or ``dataset.json`` is wrong.
    """
    name, _, folder = spec.partition(":")
    if name not in LAYOUTS or not folder:
        raise ValueError(
            f"data must be LAYOUT:FOLDER with one of the layouts {', '.join(LAYOUTS)}; got {spec!r}"
        )
    layout, root = LAYOUTS[name], Path(folder)
    if name == "folder":
        layout, name = _described(root / "dataset.json"), root.name
    own_name = layout.train if split == "train" else layout.val
    folder = layout.images.format(split=own_name)
    if layout.index:
        index = root / layout.index.format(split=own_name)
        stems = index.read_text(encoding="utf-8").split() if index.is_file() else []
        images = [root / folder / f"{stem}.jpg" for stem in stems]
    else:
        found = list_images(root / folder) if (root / folder).is_dir() else []
        images = [path for path in found if path.name.startswith(layout.prefix)]
    if not images:
        raise ValueError(
            f"{spec!r} must hold images of the split {split!r} in {folder}; found none"
        )
    labels = _truth(spec, layout.labels, root, folder, images)
    depth = _truth(spec, layout.depth, root, folder, images)
    if labels and layout.classes < 1:
        raise ValueError(
            f"labels need a number of classes, at least 1; {spec!r} gives {layout.classes}; write "
            'it into dataset.json, such as {"classes": 11}'
        )
    return Dataset(
        name=f"{name}/{split}",
        images=tuple(images),
        labels=labels,
        depth=depth,
        classes=layout.classes,
        label_map=layout.label_map,
        depth_scale=layout.depth_scale,
        max_side=max_side,
        block=layout.block,
    )


def _truth(
    spec: str, changes: Mapping[str, str], root: Path, folder: str, images: list[Path]
) -> tuple[Path, ...]:
    """Lists the truth of every image; none if the data set has no folder for it."""

    def paired(path: str) -> Path:
        for old, new in changes.items():
            path = path.replace(old, new, 1)
        return root / path.removeprefix("/")

    if not changes or not paired(f"/{folder}/").is_dir():
        return ()
    files = tuple(
        paired(f"/{path.relative_to(root).as_posix()}").with_suffix(".png") for path in images
    )
    for path in files:
        if not path.is_file():
            raise ValueError(
                f"every image of {spec!r} must have its truth; {path} is missing; "
                "remove the image or add the file"
            )
    return files


def _described(path: Path) -> Layout:
    """Reads the numbers of a data set of the plain layout."""
    if not path.is_file():
        raise ValueError(
            f'the plain layout needs {path}, such as {{"classes": 11, "depth_scale": 1000}}'
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}") from error
    known = ("classes", "depth_scale", "block")
    if not isinstance(values, dict) or not set(values) <= set(known):
        got = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} must be a JSON object with {', '.join(known)}; got {got}")
    layout = replace(LAYOUTS["folder"], **values)
    for name, least in (("classes", 0), ("block", 1)):
        value = getattr(layout, name)
        if type(value) is not int or value < least:
            raise ValueError(
                f"{name} in {path} must be a whole number, at least {least}; got {value!r}"
            )
    scale = layout.depth_scale
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):
        raise ValueError(f"depth_scale in {path} must be a number above 0; got {scale!r}")
    return layout
