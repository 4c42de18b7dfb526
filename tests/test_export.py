"""Exported models equal the eager ones at sizes not used for tracing."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from featup_hub import JBUStack, ModuleBackbone, ShiftAndStitch, UpsampledBackbone
from featup_hub.cli import main
from featup_hub.export import trace, write_onnx, write_pt2
from tests.conftest import full_disk
from tests.exported import PAIRS, assert_same, in_onnxruntime, model, pair, stack


@pytest.fixture(scope="module")
def upsampler() -> JBUStack:
    torch.manual_seed(1)
    return stack()


@pytest.fixture(scope="module")
def program(upsampler: JBUStack) -> ExportedProgram:
    return trace(upsampler, *pair(1, (5, 5), (18, 18)))


@pytest.mark.slow
def test_a_program_serves_other_sizes_after_a_round_trip(upsampler, program, tmp_path):
    write_pt2(program, tmp_path / "program.pt2")
    run = torch.export.load(tmp_path / "program.pt2").module()
    for sizes in PAIRS:
        assert_same(run, upsampler, *pair(*sizes))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    program = torch.export.export(nn.Linear(40, 50), (torch.ones(1, 40),))
    with full_disk(3000), pytest.raises(OSError, match=r"File too large.*m\.pt2"):
        write_pt2(program, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("for_onnx", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_onnxruntime_agrees_at_other_sizes(upsampler, program, for_onnx, tmp_path):
    pytest.importorskip("onnxscript")
    if for_onnx:
        program = trace(upsampler, *pair(1, (5, 5), (18, 18)), for_onnx=True)
        assert len(program.graph.nodes) < 200
    write_onnx(program, tmp_path / "graph.onnx")
    run = in_onnxruntime(tmp_path / "graph.onnx")
    for sizes in PAIRS:
        assert_same(run, upsampler, *pair(*sizes))


def test_a_graph_of_four_looks_and_odd_sides_serves_other_odd_sides(tmp_path):
    pytest.importorskip("onnxscript")
    looks = stack()
    looks.looks_per_side = 2
    write_onnx(trace(looks, *pair(1, (5, 7), (20, 28)), for_onnx=True), tmp_path / "graph.onnx")
    run = in_onnxruntime(tmp_path / "graph.onnx")
    assert_same(run, looks, *pair(2, (7, 9), (28, 36)))


def test_an_onnx_graph_of_one_size_has_the_precision_of_its_model(tmp_path):
    pytest.importorskip("onnxscript")
    upsampler = stack().half()
    inputs = [x.half() for x in pair(2, (3, 4), (12, 10))]
    program = trace(upsampler, *inputs, dynamic=False, for_onnx=True)
    write_onnx(program, tmp_path / "graph.onnx")
    with pytest.raises(ValueError, match=r"got one traced with for_onnx=True; trace again"):
        write_pt2(program, tmp_path / "program.pt2")
    got = in_onnxruntime(tmp_path / "graph.onnx")(*inputs)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, upsampler(*inputs), rtol=4e-3, atol=4e-3)


def test_programs_hold_standard_operators_only_and_refuse_another_number_of_stages(program):
    calls = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("featup_hub" in call for call in calls)
    with pytest.raises((RuntimeError, AssertionError)):
        program.module()(*pair(1, (4, 4), (33, 33)))


def test_a_static_program_takes_its_own_size_only(upsampler):
    inputs = pair(1, (3, 4), (12, 16))
    run = trace(upsampler, *inputs, dynamic=False).module()
    assert_same(run, upsampler, *inputs)
    with pytest.raises((RuntimeError, AssertionError)):
        run(*pair(1, (4, 4), (16, 16)))


def test_a_traced_model_runs_without_this_package(upsampler, tmp_path):
    inputs = pair(1, (3, 4), (12, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about sizes that become constants
        torch.jit.trace(upsampler, inputs).save(tmp_path / "traced.pt")
    torch.save((inputs, upsampler(*inputs).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.jit.load('traced.pt')(*inputs), expected)\n"
        "assert 'featup_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_large_weights_lie_in_a_second_file_that_moves_with_the_graph(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    limit = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(limit, 0)  # 1.5 GiB otherwise
    backbone = ModuleBackbone(nn.Conv2d(3, 4, 2, stride=2), feat_dim=4, patch_size=2)
    large = UpsampledBackbone(backbone, JBUStack(num_stages=1, radius=1, key_dim=2)).eval()
    image = torch.randn(1, 3, 8, 8)
    (tmp_path / "here").mkdir()
    write_onnx(trace(large, image, dynamic=False), tmp_path / "here" / "big.onnx")
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"big.onnx", "big.onnx.data"}
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same(in_onnxruntime(tmp_path / "there" / "big.onnx"), large, image)


def test_a_folder_that_is_missing_is_said_before_a_graph_is_made(program, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder of .*m\.onnx does not exist; make it"):
        write_onnx(program, tmp_path / "no" / "m.onnx")


def test_a_model_in_training_mode_is_not_exported(upsampler):
    with pytest.raises(ValueError, match=r"must be in evaluation mode; call model\.eval\(\)"):
        trace(JBUStack(), *pair(2, (5, 5), (10, 10)))


def test_a_side_of_one_is_no_example_of_a_dynamic_one(upsampler):
    with pytest.raises(ValueError, match=r"at least 2 in the example.*\(1, 4, 1, 5\)"):
        trace(upsampler, *pair(1, (1, 5), (4, 20)))


def test_a_network_of_one_size_is_exported_for_images_of_one_size_only():
    # Its source keeps its size, so other images need another number of stages.
    backbone = ModuleBackbone(nn.AvgPool2d(2), feat_dim=3, patch_size=2, fixed_size=(8, 8))
    fixed = UpsampledBackbone(backbone, JBUStack(num_stages=1, radius=1, key_dim=2)).eval()
    image = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"every image at \(8, 8\); give dynamic=False .*--static"):
        trace(fixed, image)
    assert_same(trace(fixed, image, dynamic=False).module(), fixed, image)


def test_what_onnx_lacks_is_said_before_a_model_is_traced(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("featup_hub.loading.load", None)
    assert main(["export", str(tmp_path / "x.onnx")]) == 1
    assert "needs onnx and onnxscript; pip install" in capsys.readouterr().err


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> UpsampledBackbone:
    """A tiny model, which the command loads."""
    tiny = model()
    monkeypatch.setattr("featup_hub.loading.load", lambda *_, **__: tiny)
    return tiny


def test_the_command_traces_four_looks_for_every_size_in_whole_strides_of_one_look(
    monkeypatch, tmp_path, capsys
):
    # A graph of an odd number of cells, or of an even one, does not take the other.
    looks = UpsampledBackbone(ShiftAndStitch(model().backbone, 2), stack())
    traced: list[tuple[tuple[int, ...], bool]] = []
    monkeypatch.setattr("featup_hub.loading.load", lambda *_, **__: looks)

    def note(_, image, *, dynamic, for_onnx):
        traced.append((tuple(image.shape), dynamic))

    monkeypatch.setattr("featup_hub.export.trace", note)
    monkeypatch.setattr("featup_hub.export.write_pt2", lambda *_: None)
    assert main(["export", str(tmp_path / "model.pt2"), "--looks", "4"]) == 0
    assert traced == [((1, 3, 4, 6), True)]
    assert "sides in multiples of 2 in, 4 channels out" in capsys.readouterr().out


def test_the_command_shows_its_progress_and_writes_a_program_for_one_size(
    complete, tmp_path, capsys
):
    path = tmp_path / "model"
    assert main(["export", str(path), "--format", "pt2", "--static", "18x24"]) == 0
    progress = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in progress] == [["[1/2]", "tracing"], ["[2/2]", "writing"]]
    assert_same(torch.export.load(path).module(), complete, torch.randn(1, 3, 18, 24))


def test_padding_as_tensorflows_stays_short_and_is_checked():
    layers = pytest.importorskip("timm.layers")
    padding = pytest.importorskip("timm.layers.padding")
    original = padding.get_same_padding
    convolutions = (layers.Conv2dSame(3, 3, 3 + 2 * i, stride=2) for i in range(3))
    network = nn.Sequential(*convolutions).eval()
    program = trace(network, torch.randn(1, 3, 16, 24))
    assert padding.get_same_padding is original
    output = next(n for n in program.graph.nodes if n.op == "output").args[0][0]
    assert all(len(str(side)) < 30 for side in output.meta["val"].shape)
    run = program.module()
    assert_same(run, network, torch.randn(3, 3, 40, 32))
    with pytest.raises((RuntimeError, AssertionError)):
        run(torch.randn(1, 3, 30, 32))
