"""Low-resolution features of a data set, from a backbone or from the cache on disk."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from featup_hub.backbones import Backbone, ShiftAndStitch
from featup_hub.evaluation.candidates import is_plug_in, plug_in
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.dataset import Dataset, Sample
from featup_hub.loading import find_card, load_backbone, name_and_file
from featup_hub.weights import digest, read, resolve, write

__all__ = ["Bench", "Source", "check_source", "file_stamp", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A frozen backbone as a source of features; ``name`` is its name in tables."""

    name: str
    backbone: Backbone
    identity: str | None = None  # of the backbone and its weights, the key of features on disk

    def encode(self, image: Tensor, looks: int = 1) -> Tensor:
        """Returns the features of an image, stitched if ``looks`` is above one."""
        with torch.inference_mode():
            exact = with_looks(self.backbone, looks)(image)
        features = exact.half()
        if exact.isfinite().all() and not features.isfinite().all():
            raise ValueError(
                "features must fit half precision, in which every upsampler gets them, at most "
                f"65504; those of {self.name!r} reach {float(exact.abs().max()):.6g}; scale them "
                "down in the backbone, or take normalised ones"
            )
        return features.float()


def with_looks(backbone: Backbone, looks: int) -> Backbone:
    """Returns the backbone with 1, 4, 9 … looks at each image."""
    return backbone if looks == 1 else ShiftAndStitch(backbone, isqrt(looks))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One backbone on one data set: all training images, and the images to score."""

    source: Source
    train: Dataset
    val: Dataset
    config: EvaluationConfig

    @property
    def stride(self) -> int:
        """The stride of one look, in pixels."""
        return self.source.backbone.patch_size

    def features(
        self, dataset: Dataset, looks: set[int], *, mirror: bool = False
    ) -> Iterator[tuple[Sample, dict[int, Tensor]]]:
        """Yields cropped samples and their features, (1, C, h, w), by the number of looks.

        With ``mirror`` every second image is mirrored.
        """
        for index, path in enumerate(dataset.images):
            sample = dataset[index].crop(self.stride)
            mirrored = mirror and index % 2 == 1
            sample = sample.mirror() if mirrored else sample
            key = f"{file_stamp(path)} {dataset.max_side} {mirrored}"
            yield sample, {each: self._encode(sample, each, key) for each in looks}

    def _encode(self, sample: Sample, looks: int, key: str) -> Tensor:
        cache = self.config.cache
        if cache is None or self.source.identity is None:
            return self.source.encode(sample.normalised(), looks)
        whole = hashlib.sha256(f"{self.source.identity} {looks} {key}".encode()).hexdigest()[:24]
        place = cache / "features" / f"{whole}.safetensors"
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            features = self.source.encode(sample.normalised(), looks)
            write({"features": features.half()}, place)
        return read(place)["features"].float()


def open_source(spec: str) -> Source:
    """Loads a backbone as a source of features.

    ``spec`` is ``NAME`` or ``NAME=FILE``, a name that :func:`featup_hub.load` takes and weights of
    your own, or a plug-in ``module:callable`` that returns a backbone. The old spellings
    ``LABEL=NAME`` and ``LABEL=NAME@FILE`` set its name in tables.
    """
    label, name, file = _parts(spec)
    backbone = plug_in(name)() if is_plug_in(name) else load_backbone(name, weights=file)
    if file is None and is_plug_in(name):  # a plug-in is identified by the file that defines it
        file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    identity = f"{name} {digest(file) if file else 'pretrained'}"
    return Source(name=label, backbone=backbone.requires_grad_(False), identity=identity)


def check_source(spec: str) -> None:
    """Raises the errors of :func:`open_source` about names and missing files; loads nothing."""
    _, name, file = _parts(spec)
    (plug_in if is_plug_in(name) else find_card)(name)
    if file:
        resolve(Path(file))


def _parts(spec: str) -> tuple[str, str, str | None]:
    """Returns the name in tables, the backbone's name, and a file of weights; ``@`` is old."""
    name, file = name_and_file(spec)
    if file and (Path(file).expanduser().is_file() or not _is_backbone(file.partition("@")[0])):
        return f"{name}={Path(file).stem}", name, file
    label, _, rest = spec.rpartition("=")
    name, _, file = rest.partition("@")
    return label or name, name, file or None


def _is_backbone(name: str) -> bool:
    try:
        return is_plug_in(name) or bool(find_card(name))
    except ValueError:
        return False


def file_stamp(path: Path) -> str:
    """Returns a file's path, size and time of change."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
