"""Low-resolution features of a folder of images, computed once and kept on disk.

One safetensors file per image, half precision, below a folder named after everything the
features depend on. Every upsampler sees the same rounded numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor, nn

from featup_hub.backbones import Backbone
from featup_hub.evaluation.folders import Folder, Sample
from featup_hub.model import find_card, load_backbone
from featup_hub.weights import read, write
from featup_hub.weights.files import existing

__all__ = ["CachedFeatures", "check_backbone", "fingerprint", "open_backbone", "stamp"]


class CachedFeatures:
    """Samples of a folder, cropped to a backbone's stride, with their features.

    Args:
        folder: The images.
        backbone: What computes them.
        cache: Folder to keep features in; None computes them every time.
        mirror: Whether every second image is mirrored.
    """

    def __init__(
        self,
        folder: Folder,
        backbone: Backbone,
        *,
        cache: Path | None = None,
        mirror: bool = False,
    ) -> None:
        self.folder = folder
        self.backbone = backbone
        self.stride = backbone.patch_size
        self.mirror = mirror
        self.place = None
        if cache is not None:
            key = f"stride{self.stride}-{fingerprint(backbone)}"
            self.place = cache / key / f"{folder.name.replace('/', '-')}-{folder.max_side}"
            self.place.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.folder)

    def __iter__(self) -> Iterator[tuple[Sample, Tensor]]:
        """Yields cropped samples and their features, (1, C, h, w).

        Raises:
            ValueError: If features are too large for half precision.
        """
        for index in range(len(self.folder)):
            sample = self.folder[index].crop(self.stride)
            name = _file_name(self.folder.images[index])
            if self.mirror and index % 2:
                sample, name = sample.mirror(), f"mirrored-{name}"
            yield sample, self._features(sample, name)

    def _features(self, sample: Sample, name: str) -> Tensor:
        path = None if self.place is None else self.place / name
        if path is not None and path.is_file():
            return read(path)["features"].float()
        with torch.inference_mode():
            exact = self.backbone(sample.normalised())
        features = exact.half()
        if exact.isfinite().all() and not features.isfinite().all():
            raise ValueError(
                "features must fit half precision, in which every upsampler sees them, at most "
                f"65504; those of {sample.name!r} reach {float(exact.abs().max()):.6g}; scale them "
                "down in the backbone, or take normalised ones"
            )
        if path is not None:
            write({"features": features}, path)
        return features.float()


def open_backbone(spec: str) -> tuple[str, Backbone]:
    """Loads a backbone.

    Args:
        spec: ``NAME`` or ``NAME@FILE`` with a name that :func:`featup_hub.load` takes and weights
            from a file; ``LABEL=`` in front sets what tables call it.

    Returns:
        Its name in tables, and the backbone, frozen.
    """
    label, name, file = _parts(spec)
    backbone = load_backbone(name, weights=file)
    return label, backbone.requires_grad_(False)


def check_backbone(spec: str) -> None:
    """Refuses what :func:`open_backbone` could not open, whatever the files hold.

    Raises:
        ValueError: If there is no such model or file, or the model has no backbone.
    """
    _, name, file = _parts(spec)
    if find_card(name).backbone is None:
        raise ValueError(
            f"a model with a backbone is needed; got {name!r}, an upsampler alone; name another"
        )
    if file is not None:
        try:
            existing(file)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error


def _parts(spec: str) -> tuple[str, str, str | None]:
    """Splits ``LABEL=NAME@FILE``; the label is the name where there is none."""
    label, _, rest = spec.rpartition("=")
    name, _, file = rest.partition("@")
    return label or name, name, file or None


def stamp(path: Path) -> tuple[str, int, int]:
    """Tells a file from all others and from what it was before: its place, size and time."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _file_name(image: Path) -> str:
    """Names an image's features; images of one name may lie in several folders."""
    place = hashlib.sha256(repr(stamp(image)).encode()).hexdigest()[:8]
    return f"{image.stem}-{place}.safetensors"


def fingerprint(module: nn.Module) -> str:
    """Digests all that decides what a module computes: its parts, their settings, their weights.

    Weights alone do not tell: CLIP and MaskCLIP share them, as do two layers of one network.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        kind = type(part)
        told = f"{name} {kind.__module__}.{kind.__qualname__} {_settings(part)}"
        digest.update(told.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:8]


def _settings(part: nn.Module) -> list[tuple[str, object]]:
    """Lists a module's attributes that are plain values, or functions by what they do."""
    found = []
    for name, value in sorted(vars(part).items()):
        # What calls a user's network may be all that tells two layers apart.
        function = getattr(value, "__func__", value)
        told = _told(function) if isinstance(function, FunctionType) else value
        if _is_plain(told):
            found.append((name, told))
    return found


def _told(function: FunctionType) -> tuple[object, ...]:
    """Says what a function does: its code, and the plain values that came with it."""
    code, cells = function.__code__, function.__closure__ or ()
    values = (*code.co_consts, *(function.__defaults__ or ()), *(c.cell_contents for c in cells))
    return (code.co_code, code.co_names, tuple(filter(_is_plain, values)))


def _is_plain(value: object) -> bool:
    """Tells whether a value reads the same in every process."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))
