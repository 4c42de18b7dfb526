"""Low-resolution features of a data set, from a backbone or from the cache on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from featup_hub.backbones import Backbone, ShiftAndStitch, root_of_looks
from featup_hub.evaluation.candidates import is_plug_in, own_code, plug_in
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.dataset import Dataset, Sample
from featup_hub.loading import find_backbone, load_backbone
from featup_hub.weights import digest, read, write

VERSION = 1
"""Raise this if backbones of the same weights give other features."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A frozen backbone as a source of features; ``name`` is its name in tables."""

    name: str
    backbone: Backbone
    identity: str | None = None  # the key of features on disk; of a plug-in, its own file's

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
    if looks == 1:
        return backbone
    return ShiftAndStitch(backbone, root_of_looks(looks, backbone.patch_size))


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
        how = "1" if looks == 1 else f"{looks} alternate"  # as looks are mirrored
        whole = hashlib.sha256(f"{self.source.identity} {how} {key}".encode()).hexdigest()[:24]
        place = cache / "features" / f"{whole}.safetensors"
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            features = self.source.encode(sample.normalised(), looks)
            write({"features": features.half()}, place)
        return read(place)["features"].float()


def find_source(spec: str) -> tuple[str, Callable[[], Source]]:
    """Finds a backbone: its name in tables, and a function that loads it as a source of features.

    ``spec`` is ``NAME`` or ``NAME=FILE``, a name that :func:`featup_hub.load` takes and weights of
    your own, or a plug-in ``module:callable`` that returns a backbone. Tables call a file by its
    name without suffix, and a plug-in by that of its callable.

    Raises:
        ValueError: If there is no such model or plug-in, or it takes arguments.
        FileNotFoundError: If there is no such file.
    """
    make: Callable[[], Backbone]
    if is_plug_in(spec):
        own, code = plug_in(spec)
        make, name = partial(_make, own, spec), spec.partition(":")[2]
        file = code if code.is_file() else None
        key, shipped = spec, None
    else:
        card, file = find_backbone(spec)
        make = partial(load_backbone, card, weights=file)
        shipped = card.file.sha256 if card.file else "pretrained"
        key = spec.partition("=")[0]
        name = f"{key}={file.stem}" if file else key

    def load() -> Source:
        content = digest(file) if file else shipped
        identity = content and f"{VERSION} {key} {content}"
        return Source(name=name, backbone=make().requires_grad_(False), identity=identity)

    return name, load


def _make(own: Callable[[], Backbone], spec: str) -> Backbone:
    """Calls a plug-in and checks what it returns."""
    with own_code(spec):
        backbone = own()
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"a plug-in must return a featup_hub.Backbone; {spec!r} gave "
            f"{type(backbone).__name__}; wrap a module: ModuleBackbone(module, feat_dim=..., "
            "patch_size=...)"
        )
    return backbone


def file_stamp(path: Path) -> str:
    """Returns a file's path, size and time of change."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
