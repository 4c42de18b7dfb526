"""What the fused kernels are launched with, read back through the pointers."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import torch_backend
from featup_hub.ops.cuda import backend, programs
from featup_hub.ops.cuda.driver import Function
from featup_hub.ops.cuda.programs import FusedKernels, Program
from featup_hub.upsamplers import JBUStage

CPU = -1  # the index torch gives a tensor on the CPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Launch:
    """What one kernel was launched with, and the first bytes behind its first argument."""

    function: Function
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: list[int]
    seen: bytes


@dataclass
class Recorder:
    """Stands in for the driver, and reads ``read`` bytes of what a kernel would read."""

    launches: list[Launch] = field(default_factory=list)
    read: int = 0

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[int],
    ) -> None:
        seen = ctypes.string_at(arguments[0], self.read)
        self.launches.append(Launch(function, grid, threads, shared_bytes, [*arguments], seen))

    def prepare(self, program: Program, device: torch.device) -> FusedKernels:
        index = CPU if device.type == "cpu" else device.index
        return FusedKernels(
            device=index,
            multiprocessors=132,
            program=program,
            driver=self,
            functions={name: Function(name, index, 0) for name in program.kernels},
            path=None,
            compiler="none",
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(backend, "prepare", recorder.prepare)
    return recorder


def as_tensor(content: bytes, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=like.dtype).view(like.shape)


def sliced(x: Tensor) -> Tensor:
    wide = torch.zeros(x.shape[0], x.shape[1] + 3, x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    wide[:, 1:-2, :, ::2] = x
    return wide[:, 1:-2, :, ::2]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": sliced,
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_read_sources_channels_last_whatever_their_layout(recorder, layout, dtype):
    source = LAYOUTS[layout](torch.randn(2, 5, 3, 4).to(dtype))
    recorder.read = source.nbytes
    output = backend.apply(source, torch.randn(2, 49, 6, 8), None)
    expected = source.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(as_tensor(recorder.launches[0].seen, expected), expected)
    assert (output.shape, output.dtype) == ((2, 5, 6, 8), dtype)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_sources_and_kernels_are_not_copied(recorder):
    source = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(2, 49, 6, 8).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(5)
    output = backend.apply(source, kernel, bias)
    backend.apply(source, kernel, None)
    first, second = (launch.arguments for launch in recorder.launches)
    assert first[:4] == [x.data_ptr() for x in (source, kernel, bias, output)]
    assert first[4:9] == [3, 4, 6, 8, 5]
    assert second[2] == 0  # a null pointer, where there is no bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "window", "resized"),
    [
        ((4, 7), 7, False),  # doubled
        ((8, 14), 8, False),  # the same size
        ((8, 7), 8, False),
        ((4, 8), 8, False),  # 1.75 times
        ((5, 7), 8, True),
        ((4, 9), 8, True),
        ((3, 7), 8, True),
        ((9, 7), 8, True),
    ],
)
def test_the_ratio_decides_the_window_and_few_sources_are_resized_first_in_float32(
    recorder, size, window, resized, dtype
):
    source, kernel = torch.randn(1, 5, *size).to(dtype), torch.randn(1, 49, 8, 14)
    given = source
    if resized:
        given = F.interpolate(source.float(), (8, 14), mode="bicubic", align_corners=False)
    recorder.read = given.nbytes
    output = backend.apply(source, kernel, None)
    (launch,) = recorder.launches
    assert launch.function.name == f"apply_forward_{window}"
    assert launch.arguments[4:8] == [*given.shape[-2:], 8, 14]
    expected = given.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(as_tensor(launch.seen, expected), expected)
    assert output.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 4), (6, 8), (4, 5)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_backward_results_look_like_the_torch_backends(recorder, needs, size, dtype):
    source, kernel = torch.randn(2, 5, *size).to(dtype), torch.randn(2, 49, 6, 8)
    grad = torch.randn(2, 5, 6, 8).to(dtype)
    found = backend.apply_backward(grad, source, kernel, *needs)
    expected = torch_backend.apply_backward(grad, source, kernel, *needs)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    names = {launch.function.name.rpartition("_")[0] for launch in recorder.launches}
    assert ("apply_backward_source" in names, "apply_backward_kernel" in names) == needs


@pytest.mark.parametrize("channels", [1, 127, 128, 129, 384, 1024])
@pytest.mark.parametrize("tiles", [1, 10, 528, 5000])
def test_spans_cover_every_channel_and_keep_the_device_busy(channels, tiles):
    kernels = Recorder().prepare(backend.apply_program(torch.float32), torch.device("cpu"))
    span = backend._span(channels, tiles, kernels)
    spans = backend.blocks(channels, span)
    assert span % 128 == 0
    assert (spans - 1) * span < channels <= spans * span
    assert spans == 1 or tiles * (spans - 1) < 2 * 4 * 132
    if tiles >= 4 * 132:
        assert spans == 1


def test_empty_maps_launch_nothing_and_give_empty_or_zero_results(recorder):
    kernel, weights = torch.randn(0, 49, 6, 8), JBUStage().weights()
    assert backend.apply(torch.randn(0, 5, 3, 4), kernel, None).shape == (0, 5, 6, 8)
    assert backend.kernel(torch.randn(0, 3, 6, 8), weights).shape == (0, 49, 6, 8)
    no_channels = torch.randn(2, 0, 3, 4), torch.randn(2, 49, 6, 8)
    assert backend.apply(*no_channels, None).shape == (2, 0, 6, 8)
    grad = torch.randn(2, 0, 6, 8)
    grad_source, grad_kernel = backend.apply_backward(grad, *no_channels, True, True)
    assert grad_source.shape == (2, 0, 3, 4)
    assert torch.equal(grad_kernel, torch.zeros(2, 49, 6, 8))
    assert recorder.launches == []


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (torch.zeros(1), RuntimeError, "must be on one device, cuda:1; got one on cpu; move"),
        (1 << 31, ValueError, "sizes below 2³¹; got 2147483648; split the image"),
    ],
)
def test_arguments_that_no_kernel_can_take_are_refused(recorder, argument, error, message):
    kernels = recorder.prepare(backend.kernel_program(3), torch.device("cuda", 1))
    with pytest.raises(error, match=message):
        kernels.launch("kernel_forward", (1, 1, 1), argument)


def declared(source: str) -> dict[str, list[str]]:
    """Reads the kernels a source declares: of each parameter whether it is a pointer."""
    text = (Path(programs.__file__).with_name("csrc") / source).read_text().replace("\\\n", "\n")
    for macro in re.findall(r"#define \w+\(WINDOW\)(.*?)\n\n", text, re.DOTALL):
        text += macro.replace("##WINDOW", "7") + macro.replace("##WINDOW", "8")
    found = re.findall(
        r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(([^)]*)\)', text
    )
    return {
        name: ["pointer" if "*" in part else part.split()[0] for part in parameters.split(",")]
        for name, parameters in found
    }


@pytest.mark.parametrize("guidance", [1, 3, 14])
def test_every_launch_has_the_parameters_that_its_source_declares(monkeypatch, guidance):
    found: dict[str, dict[str, list[str]]] = {}
    grids = {}

    def prepare(program, device):
        def launch(name, grid, *arguments):
            kinds = ["int" if isinstance(x, int) else "pointer" for x in arguments]
            found.setdefault(program.source, {})[name] = kinds
            grids[name] = grid

        return SimpleNamespace(multiprocessors=132, launch=launch)

    monkeypatch.setattr(backend, "prepare", prepare)
    backend.kernel(torch.randn(2, guidance, 9, 70), JBUStage(guidance).weights())
    for size in ((3, 4), (6, 8)):
        maps = torch.randn(2, 5, *size), torch.randn(2, 49, 6, 8)
        backend.apply(*maps, None)
        backend.apply_backward(torch.randn(2, 5, 6, 8), *maps, True, True)
    made = [backend.kernel_program(guidance), *backend.usual_programs()]
    assert found == {program.source: declared(program.source) for program in made}
    for program in made:
        assert set(program.kernels) == set(found[program.source])
    # 2 samples, 9x70 pixels in blocks of 128 and of 32x4.
    assert (grids["range_forward"], grids["kernel_forward"]) == ((5, 2, 1), (3, 3, 2))
