"""Reads images of any kind and depth as 8-bit RGB.

Images are read as a viewer shows them: rotated by EXIF, transparency over white, CMYK and palettes
converted to RGB. Pixels with more than 8 bits are scaled to 8. Only the first picture of an
animation or a multi-page file is read. Colour profiles are not applied, as in timm. A file that
cannot be decoded to its end is an error.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF's tags: 2 for numbers with a sign, 0 if zero is white, 2 if bands are stored one after the
# other, bits of each band.
_SAMPLE_FORMAT, _PHOTOMETRIC, _PLANES, _BITS = 339, 262, 284, 258
_RANGE = "read_image(photo, value_range=(LOW, HIGH)), or --value-range LOW HIGH on the command line"
# Pillow's names of 16-bit colours by byte order, and the opposite order.
_OTHER_ORDER = {";16B": ";16L", ";16L": ";16B"}
_OTHER_ORDER[";16N"] = ";16B" if sys.byteorder == "little" else ";16L"


def read_image(
    image: str | Path | Image.Image | NDArray[Any],
    *,
    bands: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Image.Image:
    """Reads an image as 8-bit RGB.

    Args:
        image: A file that Pillow decodes, or a PIL image, or an array (H, W) or (H, W, C). A TIFF
            that Pillow cannot decode, such as one of 13 bands, is read by tifffile if that is
            installed.
        bands: Numbers of the red, green and blue bands, counted from 1. Needed for images that are
            not grey, RGB or CMYK, with or without transparency.
        value_range: The values of black and white, such as (0, 4095) for 12 bits; values outside
            are clipped. Default: the full range of 8 or 16 bits. Needed for floating-point and
            signed pixels.

    Raises:
        OSError: If there is no such file, or it is a folder or may not be read.
        ValueError: If the file is not an image, is damaged, or has too many pixels; or if ``bands``
            or ``value_range`` is missing or wrong.
        TypeError: If ``image`` is something else.

    Example:
        >>> import numpy as np
        >>> depth = np.array([[0, 2048, 4095]], dtype=np.uint16)
        >>> read_image(depth, value_range=(0, 4095)).getpixel((1, 0))
        (128, 128, 128)
    """
    pixels = _decode(image, as_stored=bands is not None)
    if bands is not None:
        pixels = pixels.choose(bands)
    picture = Image.fromarray(pixels.to_8_bits(value_range)).convert("RGB")
    if pixels.alpha is None:
        return picture
    picture.putalpha(pixels.alpha)
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class _Pixels:
    """The values of an image."""

    name: str  # of the image, in errors
    values: NDArray[Any]  # (H, W) or (H, W, bands), of any number type
    alpha: Image.Image | None = None  # opacity, a picture of mode L; None if opaque
    inverted: bool = False  # whether the lowest value is white

    def choose(self, bands: Sequence[int]) -> _Pixels:
        """Takes three bands, counted from 1, as red, green and blue."""
        stacked = self.values if self.values.ndim == 3 else self.values[..., None]
        count = stacked.shape[2]
        if len(bands) != 3 or not all(1 <= band <= count for band in bands):
            raise ValueError(
                f"bands must be three numbers from 1 to {count}, which {self.name} has; "
                f"got {bands!r}"
            )
        chosen = stacked[..., [band - 1 for band in bands]]
        return replace(self, values=chosen, alpha=None)

    def to_8_bits(self, value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
        """Scales a range of values to 0..255, (H, W) or (H, W, 3)."""
        values = self.values
        if values.ndim == 3 and values.shape[2] != 3:
            raise ValueError(
                f"three bands are needed; {self.name} has {values.shape[2]}; say which are red, "
                "green and blue: read_image(photo, bands=(4, 3, 2)) in Python, --bands 4,3,2 on "
                "the command line"
            )
        if value_range is None and values.dtype == np.uint8:
            return values
        low, high = self._full_range() if value_range is None else value_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range needs a low and a higher value; got {value_range!r}")
        if values.dtype == np.uint8 and high > 255:
            warnings.warn(
                f"{self.name} has 8-bit pixels, which do not reach {high:g}, the white of "
                "value_range; it is read darker than it is; leave value_range out for it",
                stacklevel=3,
            )
        scaled = (values.astype(np.float64).clip(low, high) - low) * (255 / (high - low))
        if not np.isfinite(scaled).all():
            raise ValueError(f"pixels must be numbers; {self.name} has NaN, which has no colour")
        return ((255 - scaled if self.inverted else scaled) + 0.5).astype(np.uint8)

    def _full_range(self) -> tuple[float, float]:
        """Returns the values of black and white in 16 bits; other kinds do not define them."""
        low, high = self.values.min(), self.values.max()
        if self.values.dtype.kind not in "iu" or low < 0 or high > 65535:
            raise ValueError(
                f"8 or 16 bits a channel are needed; {self.name} has {self.values.dtype} pixels "
                f"from {low:g} to {high:g}; say which values are black and white: {_RANGE}"
            )
        if 0 < high < 16384:
            warnings.warn(
                f"{self.name} has 16-bit pixels, none above {high}; it is read as nearly black, "
                f"in {(high + 128) // 257 + 1} of 256 levels; say which values are black and "
                f"white: {_RANGE}",
                stacklevel=4,
            )
        return 0, 65535


def _decode(image: object, *, as_stored: bool = False) -> _Pixels:
    """Reads all values of an image, rotated by EXIF.

    With ``as_stored``, the bands are those of the file; else they are converted to grey or RGB if
    the format defines how.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"an image of at least one pixel is needed; got {image.size}")
        return _decode_picture(image, None, "the image", as_stored=as_stored)
    if isinstance(image, np.ndarray):
        image = np.asarray(image)  # a masked array gives other values under its mask
        if image.ndim not in (2, 3) or not image.size or image.dtype.kind not in "iuf":
            raise ValueError(
                "an array of pixels must be (H, W) or (H, W, bands), of integers or floats; got "
                f"{image.shape} of {image.dtype}"
            )
        if image.ndim == 3 and image.shape[2] > 4 >= image.shape[0] and not as_stored:
            raise ValueError(
                f"the bands of an array come last, (H, W, bands); got {image.shape}; give "
                "array.transpose(1, 2, 0)"
            )
        if as_stored or image.dtype != np.uint8 or image.shape[2:] not in ((1,), (2,), (4,)):
            return _Pixels(name="the array", values=image)
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        return _decode_picture(picture, None, "the array", as_stored=False)
    if not isinstance(image, (str, Path)):
        raise TypeError(
            f"an image is a path, a PIL image or a NumPy array; got {type(image).__name__}; give "
            "one image at a time; a tensor needs no reading: normalise it and call the model"
        )
    path = Path(image)
    if path.is_dir():
        raise IsADirectoryError(f"an image file is needed; {path} is a folder; name a file in it")
    if "://" in str(image):
        raise FileNotFoundError(f"an image file is needed; got {image}; download it first")
    with path.open("rb") as file:
        try:
            with _decoder_errors(str(path)):
                picture = Image.open(file)
        except UnidentifiedImageError:
            file.seek(0)
            if (start := file.read(4)) not in _TIFF:
                problem = "not an image Pillow can read, or damaged" if start else "empty"
                raise ValueError(
                    f"an image file is needed; {path} is {problem}; save it as JPEG or PNG"
                ) from None
            return _Pixels(name=str(path), values=_read_tiff(path))
        # Pillow takes 16-bit planes for 8-bit ones.
        tags = getattr(picture, "tag_v2", {})
        if tags.get(_PLANES) == 2 and 16 in tags.get(_BITS, ()) and len(picture.getbands()) > 1:
            return _Pixels(name=str(path), values=_read_tiff(path))
        return _decode_picture(picture, file, str(path), as_stored=as_stored)


def _decode_picture(
    image: Image.Image, file: BinaryIO | None, name: str, *, as_stored: bool
) -> _Pixels:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    raw = raw if isinstance(raw, str) else ""  # Pillow's name of the file's layout, such as RGB;16B
    with _decoder_errors(name):
        upright = ImageOps.exif_transpose(image)
        tags = getattr(image, "tag_v2", {})
        signed = 2 in tags.get(_SAMPLE_FORMAT, ())
        if upright.mode in {"I", "F"} or upright.mode.startswith("I;") or signed:
            values = np.asarray(upright)
            if signed and values.dtype == np.uint8:  # Pillow takes 8 bits for unsigned
                values = values.view(np.int8)
            elif raw.startswith("I;32") and not raw.endswith("S"):  # and 32 for signed
                values = values.view(np.uint32)
            return _Pixels(name=name, values=values, inverted=tags.get(_PHOTOMETRIC) == 0)
        deep: NDArray[Any] | None = None
        is_deep = raw[-4:] in _OTHER_ORDER
        if is_deep and file is not None and raw[:-4] in {"RGB", "RGBA", "RGBX"}:
            deep = np.asarray(upright).astype(np.uint16) << 8 | _low_bytes(file, raw)
        if not as_stored or upright.mode in {"1", "P", "PA"}:
            bands = {band.upper() for band in upright.getbands()}
            clear = "A" in bands or "transparency" in upright.info
            upright = upright.convert("RGBA" if clear else "RGB")
        values = np.asarray(upright) if deep is None else deep
    if is_deep and deep is None:
        advice = "give the path of its file" if file is None else "save it as RGB or RGBA"
        warnings.warn(f"Pillow keeps 8 of the 16 bits of {name}; {advice}", stacklevel=4)
    if as_stored:
        return _Pixels(name=name, values=values)
    alpha = upright.getchannel("A") if upright.mode == "RGBA" else None
    return _Pixels(name=name, values=values[..., :3], alpha=alpha)


def _low_bytes(file: BinaryIO, raw: str) -> NDArray[np.uint8]:
    """Returns the low bytes of 16-bit colours; Pillow itself keeps only the high bytes.

    Pillow takes the first or the second byte by the byte order given; we give the opposite.
    """
    file.seek(0)
    image = Image.open(file)
    other = raw[:-4] + _OTHER_ORDER[raw[-4:]]
    image.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
        for tile in image.tile
    ]
    return np.asarray(ImageOps.exif_transpose(image))


def _read_tiff(path: Path) -> NDArray[Any]:
    """Reads the first image of a TIFF that Pillow cannot, (H, W, bands)."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"Pillow cannot read {path}, a TIFF of many bands or of an unusual kind; install "
            'what can: pip install "featup_hub[tiff]"'
        ) from None
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            values, axes = series.asarray(), series.axes
    except Exception as error:  # its exceptions on damaged bytes are not documented
        raise ValueError(f"tifffile cannot read {path}, either: {error}") from error
    bands = [index for index, axis in enumerate(axes) if axis not in "YX"]
    if len(axes) - len(bands) != 2 or len(bands) > 1 or not values.size:
        raise ValueError(
            f"a TIFF of height, width and bands is needed; {path} has axes {axes}, {values.shape}"
        )
    return np.moveaxis(values, bands[0], 2) if bands else values


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Converts Pillow's exceptions on damaged bytes to one error."""
    try:
        yield
    except (UnidentifiedImageError, Warning):  # warnings, where Python makes errors of them
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has too many pixels: {error}; if you trust it, make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # a decoder's exceptions are not documented
        raise ValueError(
            f"{name} is damaged or cut short ({error}); fetch or export it again"
        ) from error
