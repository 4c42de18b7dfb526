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
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from featup_hub.evaluation.dataset import Dataset
from featup_hub.image import list_images

__all__ = ["LAYOUTS", "Layout", "layout_and_root", "open_data"]

Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set keeps its files, and how to read their values.

    Patterns contain ``{split}``, and ``{0}`` and ``{1}``, which pair a truth with its image. The
    pattern ``FOLDER/{0}.*`` matches the images of a folder and its subfolders.

    Attributes:
        images: Pattern of image files.
        labels: Pattern of label files, if there are labels.
        depth: Pattern of depth files, if there is depth.
        index: Pattern of a text file that lists ``{0}`` of every image of a split; None takes all
            files that match ``images``.
        train: The data set's own name of the split ``train``.
        val: The data set's own name of the split ``val``.
        classes: Number of classes.
        label_map: Class of every stored value, if they differ; other values are void.
        depth_scale: Stored depth per metre.
        block: Number of neighbouring images that are correlated.
    """

    images: str = "{split}/images/{0}.*"
    labels: str = "{split}/labels/{0}.png"
    depth: str = "{split}/depth/{0}.png"
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
    "bsds": Layout(images="images/{0}.*", labels="segments/{0}.png", depth="", classes=50),
    "davis": Layout(
        images="images/{0}/{1}.jpg", labels="masks/{0}/{1}.png", depth="", classes=2, block=6
    ),
    "voc": Layout(  # VOCdevkit/VOC2012
        images="JPEGImages/{0}.jpg",
        labels="SegmentationClass/{0}.png",
        depth="",
        index="ImageSets/Segmentation/{split}.txt",
        classes=21,
    ),
    "ade20k": Layout(  # ADEChallengeData2016
        images="images/{split}/{0}.*",
        labels="annotations/{split}/{0}.png",
        depth="",
        train="training",
        val="validation",
        classes=150,
        label_map=(-1, *range(150)),
    ),
    "cityscapes": Layout(
        images="leftImg8bit/{split}/{0}/{1}_leftImg8bit.png",
        labels="gtFine/{split}/{0}/{1}_gtFine_labelIds.png",
        depth="",
        classes=19,
        label_map=tuple(_CITYSCAPES.index(i) if i in _CITYSCAPES else -1 for i in range(34)),
    ),
    "coco-stuff": Layout(
        images="images/{split}/{0}.*",
        labels="annotations/{split}/{0}.png",
        depth="",
        train="train2017",
        val="val2017",
        classes=182,
    ),
    "nyuv2": Layout(  # scene folders with depth in millimetres
        images="official_splits/{split}/{0}/rgb_{1}.jpg",
        labels="",
        depth="official_splits/{split}/{0}/sync_depth_{1}.png",
        val="test",
        depth_scale=1000,
    ),
}


def open_data(spec: str, split: Split, *, max_side: int = 0) -> Dataset:
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
    name, root = layout_and_root(spec)
    layout, folder = LAYOUTS[name], Path(root)
    if name == "folder":
        layout, name = _described(folder / "dataset.json"), folder.name
    called = layout.train if split == "train" else layout.val
    found = _images(layout, folder, called)
    if not found:
        raise ValueError(
            f"{spec!r} must hold images of the split {split!r} at {layout.images!r}; found none"
        )
    labels, depth = (
        _truth(spec, pattern, folder, called, list(found.values()))
        for pattern in (layout.labels, layout.depth)
    )
    if labels and layout.classes < 1:
        raise ValueError(
            f"labels need a number of classes, at least 1; {spec!r} gives {layout.classes}; write "
            'it into dataset.json, such as {"classes": 11}'
        )
    return Dataset(
        name=f"{name}/{split}",
        images=tuple(found),
        labels=labels,
        depth=depth,
        classes=layout.classes,
        label_map=layout.label_map,
        depth_scale=layout.depth_scale,
        max_side=max_side,
        block=layout.block,
    )


def layout_and_root(spec: str) -> tuple[str, str]:
    """Splits ``LAYOUT:FOLDER``.

    Raises:
        ValueError: If ``spec`` has another form, or the layout is unknown.
    """
    layout, _, root = spec.partition(":")
    if layout not in LAYOUTS or not root:
        raise ValueError(
            f"data must be LAYOUT:FOLDER with one of the layouts {', '.join(LAYOUTS)}; got {spec!r}"
        )
    return layout, root


def _images(layout: Layout, root: Path, split: str) -> dict[Path, tuple[str, ...]]:
    """Lists the images of a split, in order, with the parts that pair them with their truth."""
    pattern = layout.images.replace("{split}", split)
    if layout.index:
        index = root / layout.index.format(split=split)
        names = index.read_text(encoding="utf-8").split() if index.is_file() else []
        return {root / pattern.format(name): (name,) for name in names}
    if pattern.endswith("/{0}.*"):
        folder = root / pattern.removesuffix("/{0}.*")
        paths = list_images(folder) if folder.is_dir() else []
        return {path: (path.relative_to(folder).with_suffix("").as_posix(),) for path in paths}
    parts = re.compile(re.sub(r"\\\{\d\\\}", "([^/]+)", re.escape(pattern)))
    return {
        path: match.groups()
        for path in sorted(root.glob(re.sub(r"\{\d\}", "[!.]*", pattern)))
        if (match := parts.fullmatch(path.relative_to(root).as_posix()))
    }


def _truth(
    spec: str, pattern: str, root: Path, split: str, parts: list[tuple[str, ...]]
) -> tuple[Path, ...]:
    """Lists the truth of every image; none if the data set has no folder for it."""
    top = root / pattern.partition("{0}")[0].format(split=split)
    if not pattern or not top.is_dir():
        return ()
    files = tuple(root / pattern.format(*each, split=split) for each in parts)
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
