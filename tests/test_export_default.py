"""The default model is exported for every size; a file of its own, which one worker takes."""

from __future__ import annotations

import pytest
import torch

from featup_hub import load
from featup_hub.export import trace, write_onnx, write_pt2
from tests.exported import assert_same, in_onnxruntime


@pytest.mark.slow
def test_the_default_model_is_written_for_every_size(tmp_path):
    pytest.importorskip("onnxscript")
    default = load("efficientnet_lite0")
    program = trace(default, torch.zeros(1, 3, 32, 48))
    for_onnx = trace(default, torch.zeros(1, 3, 32, 48), for_onnx=True)
    # Time is not asserted: it is that of about 1,800 and 600 operators, where there were 2,900.
    assert len(program.graph.nodes) < 2000
    assert len(for_onnx.graph.nodes) < 700
    write_pt2(program, tmp_path / "model.pt2")
    write_onnx(for_onnx, tmp_path / "model.onnx")
    runs = (
        torch.export.load(tmp_path / "model.pt2").module(),
        in_onnxruntime(tmp_path / "model.onnx"),
    )
    for run in runs:
        for batch, height, width in ((1, 64, 96), (3, 48, 32), (2, 80, 112)):
            assert_same(run, default, torch.randn(batch, 3, height, width))
