"""Finds images in folders, and converts them to a backbone's input."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featup_hub.ops.jbu import check_normalisation
from featup_hub.pixels import read_image

__all__ = [
    "IMAGE_SUFFIXES",
    "check_size",
    "list_images",
    "normalise",
    "normalise_values",
    "preprocess",
    "read_image",
    "resize",
    "to_tensor",
]

IMAGE_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
"""Suffixes of image files, in lower case. Some builds of Pillow cannot read AVIF."""

_OTHER_SUFFIXES = {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".raf", ".rw2"}
"""Photographs that Pillow cannot read."""


def check_size(size: int | tuple[int, int] | None, *, multiple_of: int = 1) -> None:
    """Raises ValueError unless every given side is a positive multiple of the patch size."""
    if size is None:
        return
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
        raise TypeError(f"size must be a number of pixels, or (height, width); got {size!r}")
    for side in sides:
        if side < 1 or side % multiple_of:
            below = max(side // multiple_of, 1) * multiple_of
            need = "positive" if multiple_of == 1 else f"a positive multiple of {multiple_of}"
            near = f"{below} or {below + multiple_of}"
            raise ValueError(f"size must be {need}; got {side}; try {near}")


def resize(
    image: Image.Image, size: int | tuple[int, int] | None = None, *, multiple_of: int = 1
) -> Image.Image:
    """Resizes an image to multiples of the patch size (bicubic, antialiased).

    Args:
        image: Any PIL image.
        size: None keeps the size, each side rounded to the nearest multiple. An int is the
            length of the short side; the long side follows the aspect ratio, rounded to the
            nearest multiple. In both cases the whole image is kept, stretched by at most half a
            multiple. (H, W) is exact: the image is scaled to cover it and centre-cropped.
        multiple_of: The patch size, in pixels. A rounded side is at least this long.

    Raises:
        ValueError: If ``size`` is not positive or not a multiple, or the result would have more
            pixels than Pillow's limit.

    Example:
        >>> from PIL import Image
        >>> photo = Image.new("RGB", (451, 300))
        >>> resize(photo, multiple_of=14).size  # PIL's order: width, height
        (448, 294)
        >>> resize(photo, 224, multiple_of=14).size
        (336, 224)
        >>> resize(photo, (224, 224)).size
        (224, 224)
    """
    check_size(size, multiple_of=multiple_of)
    width, height = image.size
    if isinstance(size, (tuple, list)):
        new_height, new_width = size
    else:
        scale = 1.0 if size is None else size / min(width, height)
        new_height, new_width = (
            max(int(side * scale / multiple_of + 0.5), 1) * multiple_of for side in (height, width)
        )
    if Image.MAX_IMAGE_PIXELS is not None and new_height * new_width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"at most {2 * Image.MAX_IMAGE_PIXELS} pixels; {height}×{width} would become "
            f"{new_height}×{new_width}; ask for a smaller size"
        )
    if (new_height, new_width) == (height, width):
        return image
    box = (0.0, 0.0, float(width), float(height))
    if isinstance(size, (tuple, list)):
        cover = max(new_height / height, new_width / width)
        # Rounding can make these -1e-14, which Pillow refuses (220×530 to 224×224).
        x = max(0.0, (width - new_width / cover) / 2)
        y = max(0.0, (height - new_height / cover) / 2)
        box = (x, y, width - x, height - y)
    return image.resize((new_width, new_height), Image.Resampling.BICUBIC, box=box)


def preprocess(
    image: str | Path | Image.Image | NDArray[Any],
    size: int | tuple[int, int] | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    multiple_of: int = 1,
) -> Tensor:
    """Converts an image to a backbone's input, normalised, (1, 3, H, W), float32.

    Raises as :func:`read_image` and :func:`resize`.

    Args:
        image: A file, a PIL image or an array; see :func:`read_image`.
        size: Short side, or (H, W), or None for the image's own; see :func:`resize`.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        multiple_of: The backbone's patch size, in pixels.

    Example:
        >>> from PIL import Image
        >>> black = Image.new("RGB", (60, 40))
        >>> preprocess(black, 32, mean=(0.5,) * 3, std=(0.5,) * 3, multiple_of=16).shape
        torch.Size([1, 3, 32, 48])
    """
    picture = resize(read_image(image), size, multiple_of=multiple_of)
    return normalise(picture, mean=mean, std=std)


def normalise(picture: Image.Image, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Converts an RGB picture to a backbone's input, (1, 3, H, W), float32.

    It is the last step of :func:`preprocess`, for a picture that is shown beside its features.

    Args:
        picture: A picture of :func:`read_image` or :func:`resize`, with its final size.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
    """
    return normalise_values(to_tensor(picture), mean, std)[None]


def to_tensor(picture: Image.Image) -> Tensor:
    """Converts an RGB picture to values in [0, 1], (3, H, W), float32."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255


def normalise_values(rgb: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises values in [0, 1], (..., 3, H, W)."""
    check_normalisation(mean, std)
    offset, scale = (rgb.new_tensor(values)[:, None, None] for values in (mean, std))
    return (rgb - offset) / scale


def list_images(folder: str | Path) -> list[Path]:
    """Lists the images in a folder and its subfolders, sorted by path.

    Images have a suffix in ``IMAGE_SUFFIXES``, in upper or lower case. Links to folders are
    followed, without endless loops. Hidden files (``.name``) are left out. A warning tells of
    photographs in formats that cannot be read, such as HEIC.
    """
    folder = Path(folder)

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for top, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        inside = (p for p in (Path(top), *Path(top).parents) if p.is_relative_to(folder))
        above = {parent.resolve() for parent in inside}
        folders[:] = [name for name in folders if Path(top, name).resolve() not in above]
        visible = (Path(top, name) for name in names if not name.startswith("."))
        found += (path for path in visible if path.is_file())  # no broken link
    images = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    others = [path.suffix.lower() for path in found if path.suffix.lower() in _OTHER_SUFFIXES]
    if others:
        warnings.warn(
            f"{folder} has {len(others)} photographs of other formats "
            f"({' '.join(sorted(set(others)))}), which are left out; convert them to JPEG or PNG",
            stacklevel=2,
        )
    return images
