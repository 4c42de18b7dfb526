"""Compiled upsamplers equal the eager ones; number of graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from featup_hub import JBUStack, load_upsampler
from featup_hub.export import trace
from tests.exported import CHANNELS, assert_same, pair, stack
from tests.ops.formulations import randomise


@pytest.fixture(scope="module")
def upsampler() -> JBUStack:
    torch.manual_seed(1)
    return stack()


def compiled(upsampler: JBUStack) -> tuple[Callable[..., Tensor], list[int]]:
    """Compiles for any size, without a code generator; returns also the graphs made so far."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[object]) -> Callable[..., object]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(upsampler, fullgraph=True, dynamic=True, backend=backend), graphs


@pytest.mark.slow
def test_a_dynamic_graph_is_compiled_once_per_number_of_stages(upsampler):
    run, graphs = compiled(upsampler)
    # PyTorch takes sizes that agree in the first call for one and the same, and 1 for a constant.
    for sizes in ((2, (6, 5), (24, 20)), (3, (7, 7), (28, 23)), (5, (9, 6), (35, 17))):
        assert_same(run, upsampler, *pair(*sizes))
    assert len(graphs) == 1
    for sizes in ((2, (6, 5), (11, 9)), (3, (7, 8), (14, 15))):
        assert_same(run, upsampler, *pair(*sizes))
    assert len(graphs) == 2


@pytest.mark.slow
def test_the_shipped_upsampler_is_compiled_once_if_the_first_image_is_no_square():
    upsampler = load_upsampler()
    run, graphs = compiled(upsampler)
    for height, width in ((4, 5), (5, 5), (7, 4)):
        image = torch.randn(2, 3, 16 * height, 16 * width)
        assert_same(run, upsampler, torch.randn(2, 6, height, width), image)
    assert len(graphs) == 1
    assert graphs[0] < 260


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_the_shipped_upsampler_as_one_graph(dynamic):
    torch._dynamo.reset()
    upsampler = load_upsampler()
    run = torch.compile(upsampler, fullgraph=True, dynamic=dynamic)
    assert_same(run, upsampler, torch.randn(1, 64, 14, 14), torch.randn(1, 3, 224, 224))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_inductor_compiles_a_program_ahead_of_time(tmp_path):
    upsampler = randomise(JBUStack(CHANNELS, num_stages=1, radius=1, key_dim=4)).eval()
    program = trace(upsampler, *pair(1, (4, 5), (8, 9)), dynamic=False)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "upsampler.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    assert_same(run, upsampler, *pair(1, (4, 5), (8, 9)))
