"""The stream of photographs: complete, shuffled, reproducible."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from featup_hub.training import photos as module
from featup_hub.training.photos import PhotoStream
from featup_hub.training.seeds import seeded


def test_every_photograph_comes_once_an_epoch_in_another_order(photos, monkeypatch):
    stream, opened, read = PhotoStream(photos), [], module.read_image
    monkeypatch.setattr(module, "read_image", lambda path: (opened.append(path), read(path))[1])
    for step in range(6):
        stream.batch(step, 3, (16, 16))
    first, second = opened[:9], opened[9:]
    assert sorted(first) == sorted(second) == stream.paths
    assert first != second


def test_a_sample_depends_on_seed_and_number_alone(photos):
    before = torch.random.get_rng_state()
    straight = [PhotoStream(photos, seed=1).batch(step, 2, (24, 32)) for step in range(4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    stream = PhotoStream(photos, seed=1)
    assert torch.equal(stream.batch(3, 2, (24, 32)), straight[3])
    assert torch.equal(stream.batch(1, 2, (24, 32)), straight[1])
    assert not torch.equal(PhotoStream(photos, seed=2).batch(1, 2, (24, 32)), straight[1])
    assert straight[0].shape == (2, 3, 24, 32)
    assert 0 <= straight[0].min() < straight[0].max() <= 1


def test_a_crop_of_the_full_scale_shows_the_photograph_unstretched(tmp_path):
    y, x = np.mgrid[:64, :96]
    picture = np.stack([2 * y, 2 * x, 0 * x], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    crops = [PhotoStream(tmp_path, min_scale=1.0).sample(n, (64, 64)) for n in range(8)]
    for crop in crops:
        down = crop[0].diff(dim=0) * 255
        right = crop[1].diff(dim=1).abs() * 255
        torch.testing.assert_close(down[2:-2], torch.full_like(down[2:-2], 2.0), atol=1.01, rtol=0)
        assert float(right.mean()) == pytest.approx(2, abs=0.1)
    assert {bool(crop[1, 0, -1] < crop[1, 0, 0]) for crop in crops} == {True, False}


def test_seeds_next_to_each_other_are_unrelated():
    draws = torch.stack([torch.rand(64, generator=seeded(0, n)) for n in range(64)])
    assert draws.flatten().unique().numel() > 4000
    assert float(torch.corrcoef(draws).triu(1).abs().mean()) < 0.15
    assert not torch.equal(*(torch.rand(4, generator=seeded(*n)) for n in [(1, 2), (2, 1)]))


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs a folder of photographs; .*nowhere"):
        PhotoStream(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"needs photographs .*have none"):
        PhotoStream(tmp_path)


def test_a_damaged_photograph_is_told_once_and_the_next_one_takes_its_place(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    damaged = folder / "p4.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    stream = PhotoStream(folder)
    with pytest.warns(UserWarning, match=r"p4.png is .*; training continues without it") as told:
        drawn = [stream.sample(n, (16, 16)) for n in range(27)]
    assert len(told) == 1
    sound = PhotoStream(photos)
    differing = [n for n in range(27) if not torch.equal(drawn[n], sound.sample(n, (16, 16)))]
    assert [n // 9 for n in differing] == [0, 1, 2]  # one an epoch
    again = PhotoStream(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in reversed(range(27)):  # as in a resumed run
            assert torch.equal(again.sample(n, (16, 16)), drawn[n])


def test_photographs_that_all_cannot_be_read_are_an_error(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"")
    message = r"that can be read; .* holds 3, and none can .*; check"
    with pytest.warns(UserWarning, match="is empty"), pytest.raises(ValueError, match=message):
        PhotoStream(tmp_path).sample(0, (16, 16))


def test_the_digest_tells_photographs_by_name_and_size_wherever_they_lie(photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert PhotoStream(moved).digest == PhotoStream(photos).digest
    (moved / "p0.png").rename(moved / "q0.png")
    renamed = PhotoStream(moved).digest
    (moved / "q0.png").write_bytes((photos / "p0.png").read_bytes() + b"\0")
    assert len({PhotoStream(photos).digest, renamed, PhotoStream(moved).digest}) == 3
