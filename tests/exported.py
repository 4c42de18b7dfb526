"""Shared by tests of export and compilation: small models, sizes, comparison of outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featup_hub import JBUStack, ModuleBackbone, UpsampledBackbone
from featup_hub.backbones import ChannelNorm
from tests.ops.formulations import randomise

TOLERANCE = 2e-5
CHANNELS = 4
STRIDE = 2  # one stage


def stack() -> JBUStack:
    """Two stages of 3×3 taps and a joint bilateral one: all there is to trace, in less time."""
    return randomise(JBUStack(CHANNELS, num_stages=2, radius=1, key_dim=4, joint_first=True)).eval()


def model() -> UpsampledBackbone:
    """A whole model of one stage; the default model is exported, too."""
    network = nn.Conv2d(3, CHANNELS, STRIDE, stride=STRIDE)
    # A layout that is named takes no guard against sides equal to the channels.
    backbone = ModuleBackbone(network, feat_dim=CHANNELS, patch_size=STRIDE, layout="nchw")
    upsampler = randomise(JBUStack(CHANNELS, num_stages=1, radius=1, key_dim=4))
    return UpsampledBackbone(backbone, upsampler, norm=ChannelNorm(CHANNELS)).eval()


def pair(batch: int, source: tuple[int, int], image: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, CHANNELS, *source), torch.randn(batch, 3, *image)


# Of the example's two stages: ratios above 2 and up to 4; odd sides, another ratio on each axis.
PAIRS = [(1, (4, 9), (15, 36)), (3, (7, 7), (28, 23)), (2, (6, 5), (24, 20))]


def assert_same(run: Callable[..., Tensor], eager: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected = eager(*inputs)
        got = run(*inputs)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)


def in_onnxruntime(path: Path) -> Callable[..., Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features"]

    def run(*inputs: Tensor) -> Tensor:
        names = [given.name for given in session.get_inputs()]
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run
