"""Reading images as viewers show them, and sizes that are multiples of the patch."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featup_hub.image import list_images, preprocess, read_image, resize
from tests.test_pixels import chunk

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = (255, 0, 0)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = Image.fromarray(upright)
    if back is not None:
        stored = stored.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "rotated.png"), upright)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "big endian.tif"])
def test_16_bit_grayscale_is_scaled_not_clipped(tmp_path, name):
    if name == "big endian.tif":
        bytes_ = (RAMP.astype(">u2") * 257).tobytes()
        Image.frombytes("I;16B", (16, 16), bytes_).save(tmp_path / name)
    else:
        save(tmp_path / name, RAMP.astype(np.uint16) * 257)
    assert np.array_equal(pixels(tmp_path / name), np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    black_and_white = np.zeros((16, 16, 3), np.uint8)
    black_and_white[:, 8:] = 255
    name = "x.jpg" if mode in {"CMYK", "YCbCr"} else "x.png"
    path = save(tmp_path / name, black_and_white, mode)
    assert np.abs(pixels(path).astype(int) - black_and_white).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_and_half_transparent_ones_are_mixed(tmp_path, mode):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (255, 128, 0)
    image = Image.fromarray(rgba)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
        image.putpalette([0] * 9)
        image.info["transparency"] = bytes([255, 128, 0])
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png")[0].tolist() == [[0] * 3, [127] * 3, [255] * 3]


def test_a_single_pixel_is_an_image(tmp_path):
    path = save(tmp_path / "one.png", np.full((1, 1, 3), 7, np.uint8))
    assert pixels(path).tolist() == [[[7, 7, 7]]]
    image = preprocess(path, mean=[0] * 3, std=[1] * 3, multiple_of=16)
    assert image.shape[2:] == (16, 16)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "bmp", "webp"])
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path, root, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    Image.open(root / "tests/data/chelsea.jpg").save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"cut\.\w+ is (damaged or cut short|not an image)"):
        read_image(path)


def test_what_is_not_an_image_is_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html></html>")
    with pytest.raises(ValueError, match=r"page\.jpg is not an image Pillow can read"):
        read_image(tmp_path / "page.jpg")
    (tmp_path / "page.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"page\.jpg is empty; save it"):
        read_image(tmp_path / "page.jpg")


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"https://a\.b/cat\.jpg; download it first"):
        read_image("https://a.b/cat.jpg")
    with pytest.raises(FileNotFoundError, match=r"cat\.jpg"):
        read_image(tmp_path / "cat.jpg")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"0" * 10**6)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ValueError, match=r"too many pixels.*if you trust it"):
        read_image(tmp_path / "bomb.png")


def test_damaged_metadata_does_not_hide_a_picture_and_pillow_warns_of_it(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "JPEG", exif=b"Exif\0\0II*\0garbage")
    (tmp_path / "x.jpg").write_bytes(data.getvalue())
    # Not ignored here: filters of warnings belong to the process, which may read in threads.
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert pixels(tmp_path / "x.jpg").shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("size", "multiple_of", "expected"),
    [
        (None, 1, (300, 451)),
        (None, 14, (294, 448)),
        (None, 16, (304, 448)),
        (None, 1000, (1000, 1000)),
        (224, 14, (224, 336)),
        (7, 7, (7, 14)),
        ((224, 140), 14, (224, 140)),
    ],
)
def test_sizes_are_multiples_of_the_patch(size, multiple_of, expected):
    photo = Image.new("RGB", (451, 300))
    result = resize(photo, size, multiple_of=multiple_of)
    assert result.size == expected[::-1]


def test_an_exact_size_crops_the_centre_and_keeps_proportions():
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255
    assert np.asarray(resize(Image.fromarray(wide), (50, 50))).mean() > 250
    assert np.asarray(resize(Image.fromarray(wide), 50)).shape == (50, 150, 3)


def test_an_image_of_the_right_size_is_not_touched():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 42, 3), np.uint8))
    for size in (None, 28, (28, 42)):
        assert np.array_equal(np.asarray(resize(noise, size, multiple_of=14)), np.asarray(noise))


@pytest.mark.parametrize(
    ("photo", "size", "multiple_of", "message"),
    [
        ((300, 300), 225, 14, "positive multiple of 14; got 225; try 224 or 238"),
        ((300, 300), (224, 225), 14, "positive multiple of 14; got 225; try 224 or 238"),
        ((300, 300), 0, 1, "size must be positive; got 0; try 1 or 2"),
        ((300, 300), -3, 1, "size must be positive; got -3; try 1 or 2"),
        ((40_000, 1), 224, 1, "ask for a smaller size"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_nearest(photo, size, multiple_of, message):
    with pytest.raises(ValueError, match=message):
        resize(Image.new("RGB", photo), size, multiple_of=multiple_of)


def test_preprocess_normalises_each_channel():
    red = Image.new("RGB", (6, 4), (255, 0, 51))
    image = preprocess(red, mean=(0.5, 0.25, 0.2), std=(0.5, 0.25, 0.1))
    assert image.shape == (1, 3, 4, 6)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.allclose(image[0, :, 2, 3], torch.tensor([1.0, -1.0, 0.0]), atol=1e-6)


def test_preprocess_takes_a_path_a_picture_of_any_mode_and_an_array(tmp_path):
    norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / "grey.png", grey)
    wanted = torch.from_numpy(grey).expand(1, 3, 16, 16) / 127.5 - 1
    arrays = grey, grey[..., None], np.stack([grey] * 3, 2)
    for image in (path, str(path), Image.open(path), *arrays):
        assert torch.allclose(preprocess(image, **norm), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 4, 4), TypeError, "a path, a PIL image or a NumPy array; got Tensor"),
        (np.zeros((1, 3, 4, 4), np.uint8), ValueError, r"must be \(H, W\).*got \(1, 3, 4, 4\)"),
        (np.zeros((3, 40, 40), np.uint8), ValueError, r"come last, .*; give array\.transpose\(1"),
        (np.zeros((4, 4), np.float32), ValueError, "the array has float32 pixels.*value_range"),
        (np.full((4, 4), np.nan), ValueError, "float64 pixels"),
        (Image.new("RGB", (0, 4)), ValueError, r"at least one pixel is needed; got \(0, 4\)"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_do(image, error, message):
    with pytest.raises(error, match=message):
        read_image(image)


@pytest.mark.parametrize(
    ("mean", "std"), [(0.5, 0.5), ((0.5,) * 2, (1,) * 3), ((0,) * 3, (0,) * 3)]
)
def test_a_normalisation_is_three_numbers_that_divide(mean, std):
    with pytest.raises(ValueError, match="mean and std must be three numbers each, none of std ze"):
        preprocess(Image.new("RGB", (8, 8)), mean=mean, std=std)


def test_a_size_is_a_number_or_height_and_width():
    photo = Image.new("RGB", (60, 40))
    assert resize(photo, [20, 30]).size == (30, 20)
    assert resize(photo, np.int64(20)).size == (30, 20)
    for size in ("20", 20.5, (20.0, 30), (), (20,), (20, 30, 3)):
        with pytest.raises(TypeError, match="size must be a number of pixels"):
            resize(photo, size)


def test_a_folder_lists_images_as_cameras_and_browsers_name_them(tmp_path):
    named = ["a.JPG", "b.jfif", "c.jpe", "d.WebP", "e.tif", "f.avif", "more/g.png"]
    (tmp_path / "more").mkdir()
    for name in [*named, "notes.txt", "._a.JPG", "labels.json"]:
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / name for name in named]


def test_photographs_that_pillow_cannot_read_are_left_out_with_a_warning(tmp_path):
    for name in ("a.jpg", "b.HEIC", "c.heic", "d.nef", "._e.heic", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"has 3 photographs of other formats \(\.heic \.nef\)"):
        assert list_images(tmp_path) == [tmp_path / "a.jpg"]


def test_links_to_folders_and_files_are_followed_and_loops_end(tmp_path):
    real, data = tmp_path / "real", tmp_path / "data"
    for folder in (real, data / "a"):
        folder.mkdir(parents=True)
        (folder / "x.jpg").touch()
    (data / "linked").symlink_to("../real")
    (data / "again.png").symlink_to("a/x.jpg")
    (data / "a" / "loop").symlink_to(data)
    (data / "gone.png").symlink_to("missing.png")
    found = [path.relative_to(data).as_posix() for path in list_images(data)]
    assert found == ["a/x.jpg", "again.png", "linked/x.jpg"]
    # A link to a folder above the start is a folder like any other.
    (data / "a" / "loop").unlink()
    (data / "a" / "above").symlink_to("..")
    found = [path.relative_to(data / "a").as_posix() for path in list_images(data / "a")]
    assert found == ["above/again.png", "above/linked/x.jpg", "x.jpg"]
