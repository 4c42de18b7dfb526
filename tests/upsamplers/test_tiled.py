"""Tiles equal the untiled result at every border, within their memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from featup_hub.upsamplers import JBUStack, tiled
from featup_hub.upsamplers.tiled import upsample_tiled
from tests.operations import Recorder
from tests.ops.formulations import randomise


@pytest.fixture(params=[False, True], ids=["learned", "joint"])
def stack(request: pytest.FixtureRequest) -> JBUStack:
    return randomise(JBUStack(6, joint_first=request.param)).eval()


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ((4, 6), (64, 96)),  # every stage doubles
        ((5, 4), (71, 57)),  # odd sides, another ratio on each axis, no stage exactly doubling
        ((1, 3), (2, 50)),  # less than a radius high
        ((3, 3), (3, 40)),  # nothing to do along one axis
        ((9, 9), (9, 9)),  # no stage at all
    ],
)
@pytest.mark.parametrize("side", [19, 40])
def test_tiles_are_the_whole_up_to_rounding(stack, source, output, side, monkeypatch):
    monkeypatch.setattr(tiled, "_side", lambda *_: side)
    monkeypatch.setattr(tiled, "CHANNELS", 4)
    features, image = torch.randn(2, 6, *source), torch.randn(2, 3, *output)
    with torch.no_grad():
        whole = stack(features, image)
    tiles = upsample_tiled(stack, features, image)
    assert (tiles - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_tiles_reach_another_size_than_the_images(stack, autocast):
    features, image = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 40, 50)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = stack(features, image, size=(48, 64))
        tiles = upsample_tiled(stack, features, image, size=(48, 64), max_bytes=10_000_000)
    assert (tiles - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_tiles_have_a_folded_heads_outputs(stack):
    segment = stack.fold_head(nn.Conv2d(6, 2, 1))
    features, image = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        whole = segment(features, image)
    tiles = upsample_tiled(segment, features, image, max_bytes=7_000_000)
    assert (tiles - whole).abs().max() <= 1e-5 * whole.abs().max()
    with pytest.raises(ValueError, match="head for features of 5 channels is needed; got one that"):
        upsample_tiled(JBUStack().eval().fold_head(nn.Linear(6, 2)), features[:, 1:], image)


def test_tiles_are_written_to_a_memory_mapped_file(stack, tmp_path):
    features, image = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 48, 64)
    mapped = np.lib.format.open_memmap(
        tmp_path / "features.npy", mode="w+", dtype=np.float32, shape=(1, 6, 48, 64)
    )
    upsample_tiled(stack, features, image, out=torch.from_numpy(mapped), max_bytes=7_000_000)
    mapped.flush()
    with torch.no_grad():
        whole = stack(features, image)
    read = torch.from_numpy(np.load(tmp_path / "features.npy"))
    assert (read - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("joint_first", [False, True])
def test_no_tensor_outgrows_the_memory_granted(joint_first):
    stack = JBUStack(joint_first=joint_first).eval()
    features, image = torch.randn(1, 256, 8, 8), torch.randn(1, 3, 128, 128)
    out = torch.empty(1, 256, 128, 128)
    with Recorder(out) as recorder:
        upsample_tiled(stack, features, image, out=out, max_bytes=16_000_000)
    assert 0 < recorder.largest <= 16_000_000 // 2 < out.numel() * 4


def test_what_cannot_be_tiled_is_refused(stack):
    features, image = torch.randn(1, 6, 3, 4), torch.randn(1, 3, 48, 64)
    with pytest.raises(ValueError, match=r"a small tile needs [\d,]+ bytes; got max_bytes=1,000"):
        upsample_tiled(stack, features, image, max_bytes=1000)
    with pytest.raises(ValueError, match=r"a small tile needs [\d,]+ bytes; got max_bytes=-1"):
        upsample_tiled(stack, features, image, max_bytes=-1)
    with pytest.raises(ValueError, match=r"out must have the output's shape, \(1, 6, 48, 64\)"):
        upsample_tiled(stack, features, image, out=torch.empty(1, 6, 48, 63))
    with pytest.raises(TypeError, match=r"out must be floating-point, .*; got torch.uint8"):
        upsample_tiled(stack, features, image, out=torch.empty(1, 6, 48, 64).byte())
    with pytest.raises(TypeError, match=r"for a JBUStack; got Linear; take model.upsampler"):
        upsample_tiled(nn.Linear(6, 2), features, image)
    with pytest.raises(ValueError, match=r"the upsampler is training; call eval"):
        upsample_tiled(stack.train(), features, image)
