"""From a file to the tensor that a backbone takes.

What is on disk is read as a person sees it: rotated as EXIF says, 16-bit grayscale scaled to 8
bits, transparency laid over white, CMYK and palettes converted to RGB. Of an animation or a
multi-page file the first picture is read. Colour profiles are not applied. A file that cannot be
decoded to its end is an error, never half a picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "check_size", "list_images", "preprocess", "read_image", "resize"]

IMAGE_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
"""What the names of images end in, in lower case. Some builds of Pillow cannot read AVIF."""


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        path: Any format that Pillow decodes.

    Returns:
        An upright PIL image of mode RGB.

    Raises:
        OSError: If there is no such file, or it is a folder or may not be read.
        ValueError: If the file is not an image, is damaged, or has too many pixels.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"an image file is needed; {path} is a folder")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror}") from error
    with file:
        return _to_rgb(_decode(file, path), path)


def check_size(size: int | tuple[int, int] | None, *, multiple_of: int = 1) -> None:
    """Raises ValueError unless every side asked for is a positive multiple of the patch size."""
    for side in size if isinstance(size, tuple) else () if size is None else (size,):
        if side < 1 or side % multiple_of:
            below = max(side // multiple_of, 1) * multiple_of
            need = "positive" if multiple_of == 1 else f"a positive multiple of {multiple_of}"
            near = f"{below} or {below + multiple_of}"
            raise ValueError(f"size must be {need}; got {side}; try {near}")


def resize(
    image: Image.Image, size: int | tuple[int, int] | None = None, *, multiple_of: int = 1
) -> Image.Image:
    """Resizes an image to a size that a patch divides (bicubic, antialiased).

    Args:
        image: Any PIL image.
        size: None keeps the size, each side rounded to the nearest multiple. An int is the
            length of the short side; the long side follows the aspect ratio, rounded to the
            nearest multiple. Either way the whole image is kept, stretched by at most half a
            multiple. (H, W) is exact: the image is scaled to cover it and centre-cropped.
        multiple_of: The patch size, in pixels. A rounded side is at least this long.

    Returns:
        The resized image.

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
    from PIL import Image

    check_size(size, multiple_of=multiple_of)
    width, height = image.size
    if isinstance(size, tuple):
        new_height, new_width = size
    else:
        scale = 1.0 if size is None else size / min(width, height)
        new_height, new_width = (_nearest(side * scale, multiple_of) for side in (height, width))
    if Image.MAX_IMAGE_PIXELS is not None and new_height * new_width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"at most {2 * Image.MAX_IMAGE_PIXELS} pixels; {height}×{width} would become "
            f"{new_height}×{new_width}; ask for a smaller size"
        )
    if (new_height, new_width) == (height, width):
        return image
    box = (0.0, 0.0, float(width), float(height))
    if isinstance(size, tuple):
        cover = max(new_height / height, new_width / width)
        # Rounding can make these -1e-14, which Pillow refuses (220×530 to 224×224).
        x = max(0.0, (width - new_width / cover) / 2)
        y = max(0.0, (height - new_height / cover) / 2)
        box = (x, y, width - x, height - y)
    return image.resize((new_width, new_height), Image.Resampling.BICUBIC, box=box)


def preprocess(
    image: Image.Image,
    size: int | tuple[int, int] | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    multiple_of: int = 1,
) -> Tensor:
    """Makes of an image what a backbone takes.

    Args:
        image: An RGB image, see :func:`read_image`.
        size: Short side, or (H, W), or None for the image's own; see :func:`resize`.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        multiple_of: The backbone's patch size, in pixels.

    Returns:
        The normalised image, (1, 3, H, W), float32.

    Raises:
        ValueError: If the image is not RGB, or as :func:`resize`.

    Example:
        >>> from PIL import Image
        >>> black = Image.new("RGB", (60, 40))
        >>> preprocess(black, 32, mean=(0.5,) * 3, std=(0.5,) * 3, multiple_of=16).shape
        torch.Size([1, 3, 32, 48])
    """
    import numpy as np

    if image.mode != "RGB":
        raise ValueError(f"an RGB image is needed; got mode {image.mode}; read it by read_image")
    pixels = torch.from_numpy(np.array(resize(image, size, multiple_of=multiple_of)))
    values = pixels.permute(2, 0, 1).contiguous().float() / 255
    return ((values - _per_channel(mean)) / _per_channel(std))[None]


def list_images(folder: str | Path) -> list[Path]:
    """Lists the images in a folder and its subfolders, sorted by path.

    Links to folders are followed, and loops of links end. Hidden files (``.name``) are left out.

    Args:
        folder: Where to look.

    Returns:
        Files whose suffix is one of ``IMAGE_SUFFIXES``, in upper or lower case.

    Raises:
        OSError: If the folder does not exist or cannot be read.
    """
    return sorted(_walk(Path(folder), ()))


def _walk(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yields the images below a folder; ``parents`` are the folders on the way to it."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in parents:
        return
    try:
        entries = list(folder.iterdir())
    except PermissionError:
        if not parents:
            raise
        warnings.warn(f"{folder} may not be read; its images are left out", stacklevel=2)
        return
    for path in entries:
        if path.is_dir():
            yield from _walk(path, (*parents, here))
        elif (
            path.suffix.lower() in IMAGE_SUFFIXES
            and not path.name.startswith(".")
            and path.is_file()  # no broken link
        ):
            yield path


def _decode(file: BinaryIO, path: Path) -> Image.Image:
    """Decodes all pixels and turns them upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    with warnings.catch_warnings():
        # Unusual metadata and big pictures (up to twice Pillow's limit) are no concern of ours.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file)
            image.load()
            return ImageOps.exif_transpose(image)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{path} has too many pixels: {error}; if you trust it, make it smaller, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS"
            ) from error
        except UnidentifiedImageError as error:
            what = "not an image Pillow can read, or its beginning is damaged"
            what = what if path.stat().st_size else "an empty file"
            raise ValueError(f"an image file is needed; {path} is {what}") from error
        except Exception as error:  # what a decoder raises on damaged bytes is not documented
            raise ValueError(
                f"{path} is damaged or cut short ({error}); fetch or export it again"
            ) from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Converts any mode to RGB without clipping, over white where it is transparent."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError(
            f"8 or 16 bits a channel are needed; {path} has floating-point pixels, whose white is "
            "not defined; save it as an 8-bit or 16-bit image"
        )
    if image.mode.startswith("I"):
        return _scale_16_bits(image, path).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_16_bits(image: Image.Image, path: Path) -> Image.Image:
    """Maps 0..65535 to 0..255, where Pillow's own conversion clips at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"8 or 16 bits a channel are needed; {path} has 32-bit pixels from {values.min()} to "
            f"{values.max()}; save it as an 8-bit or 16-bit image"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _nearest(side: float, multiple_of: int) -> int:
    return max(int(side / multiple_of + 0.5), 1) * multiple_of


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]
