"""Pixels of every depth and number of bands: levels are kept, or an error gives a remedy."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featup_hub.image import read_image

RAMP = np.linspace(0, 4095, 512).round().astype(np.uint16).reshape(16, 32)
LEVELS = np.round(RAMP / 4095 * 255).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(path: Path, values: np.ndarray, clear: tuple[int, ...] = ()) -> Path:
    """Writes a PNG of 16 bits a channel, which Pillow cannot for colours."""
    height, width = values.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    clear_value = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    body = header + clear_value + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def colours(ramp: np.ndarray, opacity: int | None = None) -> np.ndarray:
    bands = [ramp, ramp[::-1], ramp[:, ::-1]]
    return np.stack(bands if opacity is None else [*bands, np.full_like(ramp, opacity)], 2)


@pytest.mark.parametrize("kind", ["grey", "colour", "transparent", "a transparent value"])
def test_12_bits_in_16_are_warned_of_and_keep_all_levels_with_a_range(tmp_path, kind):
    deep = colours(RAMP, 65535) if kind == "transparent" else colours(RAMP)
    clear = (9, 9, 9) if kind == "a transparent value" else ()
    path = deep_png(tmp_path / "x.png", RAMP if kind == "grey" else deep, clear)
    with pytest.warns(UserWarning, match=r"none above 4095.*17 of 256.*--value-range LOW HIGH"):
        read_image(path)
    found = np.asarray(read_image(path, value_range=(0, 4095)))
    assert np.array_equal(found, np.stack([LEVELS] * 3, 2) if kind == "grey" else colours(LEVELS))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"compression": "zlib"},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "zlib"},
        {"extrasamples": ["unspecified"]},
    ],
)
def test_12_bit_colours_of_a_tiff_keep_all_levels_in_planes_and_beside_infrared(
    tmp_path, layout, order
):
    tifffile = pytest.importorskip("tifffile")
    values = colours(RAMP, 4095) if "extrasamples" in layout else colours(RAMP)
    values = values.transpose(2, 0, 1) if "planarconfig" in layout else values
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, values, photometric="rgb", byteorder=order, **layout)
    with pytest.warns(UserWarning, match=r"none above 4095.*17 of 256"):
        read_image(path)
    found = np.asarray(read_image(path, value_range=(0, 4095)))
    assert np.array_equal(found, colours(LEVELS))


def test_16_bit_grey_with_white_as_zero_is_shown_as_its_8_bit_form(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", RAMP * 16, photometric="miniswhite")
    found = np.asarray(read_image(tmp_path / "x.tif"))
    assert np.abs(255 - found[..., 0].astype(int) - LEVELS).max() <= 1


def test_8_bits_where_more_were_meant_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"the array has 8-bit pixels, which do not reach 4095"):
        read_image(np.full((4, 4), 200, np.uint8), value_range=(0, 4095))
    path = deep_png(tmp_path / "x.png", colours(RAMP))
    with Image.open(path) as picture, pytest.warns(UserWarning, match=r"8 of the 16.*the path"):
        read_image(picture)
    with pytest.warns(UserWarning, match=r"8 of the 16 bits of .*x\.png; save it as RGB or RGBA"):
        read_image(deep_png(path, colours(RAMP)[..., :2]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_masked_pixels_are_read_as_the_values_below_the_mask(dtype):
    values = np.array([[10, 20], [30, 40]], dtype)
    masked = np.ma.masked_array(values, mask=values > 20)
    found = np.asarray(read_image(masked, value_range=(0, 40)))
    assert np.array_equal(found, np.asarray(read_image(values, value_range=(0, 40))))


def test_transparent_16_bit_colours_lie_over_white(tmp_path):
    path = deep_png(tmp_path / "x.png", colours(RAMP, 0))
    assert (np.asarray(read_image(path, value_range=(0, 4095))) == 255).all()


def test_16_bit_colours_are_read_without_a_word(tmp_path):
    path = deep_png(tmp_path / "x.png", colours(RAMP * 16))
    assert np.array_equal(
        np.asarray(read_image(path)), (colours(RAMP.astype(int) * 16) + 128) // 257
    )


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_float_and_signed_pixels_need_a_range(tmp_path, dtype):
    values = (RAMP.astype(np.int32) - 2048).astype(dtype)
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"8 or 16 bits.*from -2048 to 2047.*--value-range"):
        read_image(tmp_path / "x.tif")
    found = np.asarray(read_image(tmp_path / "x.tif", value_range=(-2048, 2047)))
    assert np.array_equal(found[..., 0], LEVELS)
    clipped = np.asarray(read_image(tmp_path / "x.tif", value_range=(-1, 0)))
    assert set(clipped.flat) == {0, 255}


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(np.int8, -128, 127), (np.uint32, 0, 2**32 - 1)]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_8_bits_with_a_sign_and_32_without_are_read_as_the_tiff_says(
    tmp_path, dtype, low, high, order
):
    tifffile = pytest.importorskip("tifffile")
    values = np.linspace(low, high, 512).round().astype(dtype).reshape(16, 32)
    tifffile.imwrite(tmp_path / "x.tif", values, byteorder=order)
    with pytest.raises(ValueError, match=rf"has {dtype.__name__} pixels from {low} to "):
        read_image(tmp_path / "x.tif")
    found = np.asarray(read_image(tmp_path / "x.tif", value_range=(low, high)))
    wanted = (values.astype(np.float64) - low) / (high - low) * 255
    assert np.abs(found[..., 0] - wanted).max() <= 0.5


def test_a_range_must_rise_and_pixels_be_numbers():
    for ends in ((5, 5), (0, np.inf), (np.nan, 1)):
        with pytest.raises(ValueError, match="a low and a higher value; got ") as caught:
            read_image(RAMP, value_range=ends)
        assert str(caught.value).endswith(f"got {ends!r}")
    with pytest.raises(ValueError, match="the array has NaN"):
        read_image(np.array([[np.nan, 1.0]]), value_range=(0, 1))


@pytest.mark.parametrize("planes", [True, False])
def test_three_of_thirteen_bands_are_chosen(tmp_path, planes):
    tifffile = pytest.importorskip("tifffile")
    stack = np.stack([np.full((8, 9), 100 * band, np.uint16) for band in range(1, 14)])
    path = tmp_path / "x.tif"
    if planes:
        tifffile.imwrite(path, stack, photometric="minisblack", planarconfig="separate")
    else:
        stack = stack.transpose(1, 2, 0)
        tifffile.imwrite(path, stack, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match=r"has 13; say which.*--bands 4,3,2"):
        read_image(path)
    found = read_image(path, bands=np.array([4, 3, 13]), value_range=np.array([0, 1300]))
    assert found.size == (9, 8)
    assert found.getpixel((0, 0)) == (78, 59, 255)
    for bands in ((0, 1, 14), (1, 2)):
        with pytest.raises(ValueError, match=r"three numbers from 1 to 13, which .* has; got "):
            read_image(path, bands=bands)


def test_a_damaged_tiff_without_pixels_is_refused(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((8, 9, 13), np.uint16), planarconfig="contig")
    empty = np.zeros((0, 9, 13), np.uint16)
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda self: empty)
    with pytest.raises(ValueError, match=r"height, width and bands .*x.tif has .*\(0, 9, 13\)"):
        read_image(tmp_path / "x.tif")


def test_without_tifffile_the_error_names_what_reads_many_bands(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "x.tif",
        np.zeros((13, 8, 9), np.uint16),
        photometric="minisblack",
        planarconfig="separate",
    )
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r'many bands.*pip install "featup_hub\[tiff\]"'):
        read_image(tmp_path / "x.tif")


def test_bands_of_a_picture_are_those_of_the_file(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 40)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", bands=(4, 3, 1)).getpixel((0, 0)) == (40, 30, 10)
    assert read_image(np.full((4, 4), 7, np.uint8), bands=(1, 1, 1)).getpixel((0, 0)) == (7, 7, 7)
