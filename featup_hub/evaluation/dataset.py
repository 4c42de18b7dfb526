"""A data set: images with labels or depth, read from files and cropped to fit a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featup_hub.evaluation.scores import boundary_band, depth_edges, depth_sums, segmentation_sums
from featup_hub.image import normalise_values, to_tensor
from featup_hub.pixels import read_image
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its ground truth, where the data has any."""

    name: str  # of the file, without suffix
    image: Tensor  # RGB in [0, 1], (3, H, W)
    labels: Tensor | None = None  # classes, negative for void, (H, W)
    depth: Tensor | None = None  # metres, 0 where missing, (H, W)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.image.shape[-2], self.image.shape[-1])

    def crop(self, stride: int) -> Sample:
        """Crops the centre to the largest multiples of the stride.

        Pixels are not resampled, so labels stay exact and edges stay in place.
        """
        height, width = self.size
        if height < stride or width < stride:
            raise ValueError(
                f"an image must hold at least one {stride}×{stride} cell; "
                f"{self.name!r} is {height}×{width}; choose a smaller stride"
            )
        return self._centre(height - height % stride, width - width % stride)

    def mirror(self) -> Sample:
        """Mirrors image and truth left to right."""
        return self._each(lambda x: x.flip(-1))

    def square(self, size: tuple[int, int]) -> Tensor:
        """Crops the centre square and resizes it, normalised, (1, 3, *size)."""
        edge = min(self.size)
        return self._centre(edge, edge)._resized(size).normalised()

    def shrink(self, max_side: int) -> Sample:
        """Resizes the image so that no side exceeds ``max_side``; 0 keeps every image as it is."""
        scale = max_side / max(self.size)
        if max_side == 0 or scale >= 1:
            return self
        height, width = (max(round(side * scale), 1) for side in self.size)
        return self._resized((height, width))

    def normalised(self) -> Tensor:
        """Returns the normalised image for backbones and upsamplers, (1, 3, H, W)."""
        return normalise_values(self.image, IMAGENET_MEAN, IMAGENET_STD)[None]

    def shares(self, classes: int, size: tuple[int, int]) -> Tensor:
        """Averages one-hot labels down to a size, (K, *size)."""
        if self.labels is None:
            raise ValueError(f"labels are needed; {self.name!r} has none; add them")
        onehot = (self.labels == torch.arange(classes)[:, None, None]).float()
        return F.adaptive_avg_pool2d(onehot, size)

    def sums(self, labels: Tensor | None, depth: Tensor | None, classes: int) -> dict[str, Tensor]:
        """Compares predicted classes and depth, (H, W) each, with the truth, where there is any."""
        sums: dict[str, Tensor] = {}
        if labels is not None and self.labels is not None and self._band is not None:
            sums |= segmentation_sums(labels, self.labels, self._band, classes)
        if depth is not None and self.depth is not None and self._edges is not None:
            sums |= depth_sums(depth, self.depth, self._edges)
        return sums

    @cached_property
    def _band(self) -> Tensor | None:
        return None if self.labels is None else boundary_band(self.labels)

    @cached_property
    def _edges(self) -> Tensor | None:
        return None if self.depth is None else depth_edges(self.depth)

    def _centre(self, rows: int, columns: int) -> Sample:
        top, left = (self.size[0] - rows) // 2, (self.size[1] - columns) // 2
        return self._each(lambda x: x[..., top : top + rows, left : left + columns])

    def _resized(self, size: tuple[int, int]) -> Sample:
        def resize(x: Tensor) -> Tensor:
            if x is self.image:
                return F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
            return F.interpolate(x[None, None].double(), size, mode="nearest-exact")[0, 0].to(x)

        return self._each(resize)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """Changes the image, and the truth where there is any."""
        maps = {"image": self.image, "labels": self.labels, "depth": self.depth}
        changed: dict[str, Any] = {k: change(x) for k, x in maps.items() if x is not None}
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One split of a data set."""

    name: str  # in tables, such as camvid/val
    images: tuple[Path, ...]  # in order
    labels: tuple[Path, ...] = ()  # files, one per image, or none
    depth: tuple[Path, ...] = ()  # files, one per image, or none
    classes: int = 0  # their number; labels outside 0 .. classes-1 are void
    label_map: tuple[int, ...] = ()  # class of every stored value; values beyond it are void
    depth_scale: float = 1.0  # stored depth per metre
    max_side: int = 0  # images with a longer side are resized to it; 0 keeps every image as it is
    block: int = 1  # correlated neighbours, as in a clip, which the bootstrap draws together

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        path = self.images[index]
        sample = Sample(
            name=path.stem,
            image=to_tensor(read_image(path)),
            labels=self._labels(self.labels[index]) if self.labels else None,
            depth=_read(self.depth[index]).float() / self.depth_scale if self.depth else None,
        )
        for kind, truth in (("labels", sample.labels), ("depth", sample.depth)):
            if truth is not None and truth.shape != sample.size:
                raise ValueError(
                    f"the {kind} of {path} must have the image's size, {sample.size}; "
                    f"got {tuple(truth.shape)}"
                )
        return sample.shrink(self.max_side)

    def check_truth(self) -> None:
        """Raises ValueError if the data has neither labels nor depth."""
        if not self.labels and not self.depth:
            raise ValueError(
                f"labels or depth are needed beside the images of {self.name}; it has neither; "
                "add them, or measure only consistency and cost"
            )

    def spread(self, count: int) -> Dataset:
        """Keeps ``count`` evenly spread images; all if 0 or if there are fewer."""
        kept = evenly(len(self), count)
        block = max(round(self.block * len(kept) / len(self)), 1)
        return replace(self._only(kept), block=block)

    def videos(self) -> list[Dataset]:
        """Splits the images by folder; a folder of several holds the frames of one video."""
        folders: dict[Path, list[int]] = {}
        for index, image in enumerate(self.images):
            folders.setdefault(image.parent, []).append(index)
        videos = [self._only(indices) for indices in folders.values() if len(indices) > 1]
        if not videos:
            raise ValueError(
                "propagation needs videos, each a folder of two frames or more; "
                f"{self.name} has one image a folder; add later frames, or skip propagation"
            )
        return videos

    def _only(self, keep: Sequence[int]) -> Dataset:
        files = {"images": self.images, "labels": self.labels, "depth": self.depth}
        kept: dict[str, Any] = {k: tuple(x[i] for i in keep) for k, x in files.items() if x}
        return replace(self, **kept)

    def _labels(self, path: Path) -> Tensor:
        labels = _read(path).long()
        if self.label_map:
            lookup = torch.tensor([*self.label_map, -1])
            labels = lookup[labels.clamp(0, len(self.label_map))]
        return labels.masked_fill((labels < 0) | (labels >= self.classes), -1)


def evenly(total: int, count: int) -> list[int]:
    """Returns ``count`` of ``total`` indices, evenly spread; all if 0 or if there are fewer."""
    if not 0 < count < total:
        return list(range(total))
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _read(path: Path) -> Tensor:
    """Reads the stored values of a label or depth file, not palette colours, (H, W)."""
    with Image.open(path) as picture:
        values = np.array(picture)
    if values.ndim != 2:
        raise ValueError(
            f"labels and depth must be stored as one channel; {path} is {values.shape}; "
            "convert colours to class numbers first"
        )
    return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)
