"""``featup-hub train``: files that ``upsample`` takes."""

from __future__ import annotations

SMALL = "--batch 1 --image-size 32 --views 1 --crf-samples 10 --projection-dim 4"
TRAIN = f"train photos --out run {SMALL} --steps"


def test_train_makes_a_file_that_upsample_takes(photos, command):
    done = command(TRAIN, "1 --model efficientnet_lite0")
    assert (done.code, done.out) == (0, "wrote run/jbu.safetensors\n")
    flags = "--upsampler run/jbu.safetensors --out out --size 32"
    assert command("upsample photos/a.jpg", flags).code == 0
    done = command(TRAIN, "1 --lr 1")
    assert done.code == 1
    assert "another config" in done.err
