"""The launcher: arguments of the fused kernels, read back through the pointers."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.ops import torch_backend
from featup_hub.ops.cuda import backend, programs
from featup_hub.ops.cuda.cache import Cubin
from featup_hub.ops.cuda.driver import Function, Signature
from featup_hub.ops.cuda.programs import FusedKernels, Program
from featup_hub.upsamplers import JBUStage

CPU = -1  # the index torch gives a tensor on the CPU
BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass
class Launch:
    """One launch: what was asked for."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    device: int
    arguments: list[float]


@dataclass
class Recorder:
    """Stands in for the driver, and reads what the kernels would read."""

    launches: list[Launch] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)
    read: tuple[str, int, int] = ("", 0, 0)  # kernel, argument, bytes to keep

    def current_stream(self, device: int) -> int:
        return 1000 + device

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[float],
    ) -> None:
        function.signature.pack(arguments)  # refuses a wrong count or a number too large
        self.launches.append(
            Launch(function.name, grid, block, shared_bytes, stream, function.device, [*arguments])
        )
        name, index, size = self.read
        if name == function.name:
            self.seen.append(ctypes.string_at(int(arguments[index]), size))

    def load(self, device: int, image: bytes, kernels: dict[str, str]) -> dict[str, Function]:
        return {
            name: Function(name, device, 0, Signature(codes)) for name, codes in kernels.items()
        }

    def prepare(self, program: Program, device: torch.device) -> FusedKernels:
        parameters = {name: kernel.parameters for name, kernel in program.kernels.items()}
        return FusedKernels(
            device=CPU if device.type == "cpu" else device.index,
            multiprocessors=132,
            program=program,
            launcher=self,
            functions=self.load(CPU, b"", parameters),
            cubin=Cubin(image=b"", path=None, hit=False),
            compiler="none",
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module in (programs, backend):
        monkeypatch.setattr(module, "prepare", recorder.prepare)
    return recorder


def as_tensor(content: bytes, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=like.dtype).view(like.shape)


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.zeros(x.shape[0], x.shape[1] + 3, x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    sliced = wide[:, 1:-2, :, ::2]
    sliced.copy_(x)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:1].expand_as(x),
    }


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "sliced", "transposed", "expanded"]
)
def test_kernels_read_sources_channels_last_whatever_their_layout(
    recorder: Recorder, layout: str, dtype: torch.dtype
) -> None:
    source = layouts(torch.randn(2, 5, 3, 4).to(dtype))[layout]
    recorder.read = ("apply_forward_7", 0, source.numel() * BYTES[dtype])
    output = backend.apply(source, torch.randn(2, 49, 6, 8), None)
    expected = source.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(as_tensor(recorder.seen[0], expected), expected)
    assert (output.shape, output.dtype) == ((2, 5, 6, 8), dtype)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_sources_and_kernels_are_not_copied(recorder: Recorder) -> None:
    source = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(2, 49, 6, 8).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(5)
    output = backend.apply(source, kernel, bias)
    (launch,) = recorder.launches
    assert launch.arguments[:4] == [x.data_ptr() for x in (source, kernel, bias, output)]
    assert launch.arguments[4:9] == [3, 4, 6, 8, 5]


def test_launches_go_to_the_current_stream_of_the_tensors_device(recorder: Recorder) -> None:
    backend.apply(torch.randn(1, 5, 3, 4), torch.randn(1, 49, 6, 8), None)
    backend.kernel(torch.randn(1, 3, 6, 8), JBUStage().weights())
    assert {(launch.stream, launch.device) for launch in recorder.launches} == {(999, CPU)}
    assert [launch.name for launch in recorder.launches] == [
        "apply_forward_7",
        "range_forward",
        "kernel_forward",
    ]


def test_without_a_bias_the_kernel_gets_a_null_pointer(recorder: Recorder) -> None:
    backend.apply(torch.randn(1, 5, 3, 4), torch.randn(1, 49, 6, 8), None)
    assert recorder.launches[0].arguments[2] == 0


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
def test_the_ratio_decides_the_window_and_few_sources_are_resized_first(
    recorder: Recorder, size: tuple[int, int], window: int, resized: bool
) -> None:
    source, kernel = torch.randn(1, 5, *size), torch.randn(1, 49, 8, 14)
    given = source
    if resized:
        given = F.interpolate(source, (8, 14), mode="bicubic", align_corners=False)
    recorder.read = (f"apply_forward_{window}", 0, 4 * given.numel())
    backend.apply(source, kernel, None)
    (launch,) = recorder.launches
    assert launch.arguments[4:8] == [*given.shape[-2:], 8, 14]
    expected = given.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(as_tensor(recorder.seen[0], expected), expected)


def test_half_precision_sources_of_an_odd_ratio_are_resized_in_float32(
    recorder: Recorder,
) -> None:
    source = torch.randn(1, 5, 4, 5).bfloat16()
    given = F.interpolate(source.float(), (6, 8), mode="bicubic", align_corners=False)
    recorder.read = ("apply_forward_8", 0, 4 * given.numel())
    output = backend.apply(source, torch.randn(1, 49, 6, 8), None)
    expected = given.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(as_tensor(recorder.seen[0], expected), expected)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("size", [(3, 4), (6, 8), (4, 5)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_backward_results_look_like_the_torch_backends(
    recorder: Recorder, needs: tuple[bool, bool], size: tuple[int, int], dtype: torch.dtype
) -> None:
    source, kernel = torch.randn(2, 5, *size).to(dtype), torch.randn(2, 49, 6, 8)
    grad = torch.randn(2, 5, 6, 8).to(dtype)
    found = backend.apply_backward(grad, source, kernel, *needs)
    expected = torch_backend.apply_backward(grad, source, kernel, *needs)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    names = {launch.name.rpartition("_")[0] for launch in recorder.launches}
    assert ("apply_backward_source" in names, "apply_backward_kernel" in names) == needs


def test_the_gradient_of_a_resized_source_is_the_adjoint_of_resizing() -> None:
    source, grad = torch.randn(2, 5, 4, 5, requires_grad=True), torch.randn(2, 5, 6, 8)
    resized = F.interpolate(source, (6, 8), mode="bicubic", align_corners=False)
    (expected,) = torch.autograd.grad(resized, source, grad)
    found = backend._resize_backward(grad.permute(0, 2, 3, 1).contiguous(), source)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("channels", [1, 127, 128, 129, 384, 1024])
@pytest.mark.parametrize("tiles", [1, 10, 528, 5000])
def test_spans_cover_every_channel_and_keep_the_device_busy(channels: int, tiles: int) -> None:
    kernels = dataclasses.replace(
        Recorder().prepare(backend.usual_programs()[1], torch.device("cpu")), multiprocessors=132
    )
    span = backend._span(channels, tiles, kernels)
    spans = programs.blocks(channels, span)
    assert span % 128 == 0
    assert (spans - 1) * span < channels <= spans * span
    assert spans == 1 or tiles * (spans - 1) < 2 * 4 * 132
    if tiles >= 4 * 132:
        assert spans == 1


def test_empty_maps_launch_nothing_and_give_empty_or_zero_results(recorder: Recorder) -> None:
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


def test_a_tensor_on_another_device_is_refused(recorder: Recorder) -> None:
    kernels = recorder.prepare(backend.usual_programs()[0], torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="must be on one device, cuda:1; got one on cpu; move"):
        kernels.launch("kernel_forward", (1, 1, 1), torch.zeros(1))


@pytest.mark.parametrize("guidance", [1, 3, 14])
def test_every_launch_matches_its_kernels_parameters(recorder: Recorder, guidance: int) -> None:
    stage = JBUStage(guidance)
    image = torch.randn(2, guidance, 9, 70)
    backend.kernel(image, stage.weights())
    counts = {launch.name: launch.arguments for launch in recorder.launches}
    program = backend.kernel_program(guidance)
    assert set(counts) == set(program.kernels)
    for name, kernel_info in program.kernels.items():
        assert len(counts[name]) == len(kernel_info.parameters)
    # 2 samples, 9x70 pixels in blocks of 32x4 and of 512.
    grids = {launch.name: launch.grid for launch in recorder.launches}
    assert grids["range_forward"] == (2, 2, 1)
    assert grids["kernel_forward"] == (3, 3, 2)


def declared(source: str) -> dict[str, str]:
    """Reads the kernels a source declares, and their parameters in the letters of Signature."""
    text = (Path(programs.__file__).with_name("csrc") / source).read_text().replace("\\\n", "\n")
    for macro in re.findall(r"#define \w+\(WINDOW\)(.*?)\n\n", text, re.DOTALL):
        text += macro.replace("##WINDOW", "7") + macro.replace("##WINDOW", "8")
    found = re.findall(
        r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(([^)]*)\)', text
    )
    letter = {"int": "i", "long long": "q", "float": "f"}
    return {
        name: "".join(
            "P" if "*" in part else letter[part.strip().rsplit(" ", 1)[0]]
            for part in parameters.split(",")
        )
        for name, parameters in found
    }


@pytest.mark.parametrize("program", backend.usual_programs(), ids=str)
def test_the_launcher_knows_the_parameters_each_source_declares(program: Program) -> None:
    expected = {name: kernel.parameters for name, kernel in program.kernels.items()}
    assert declared(program.source) == expected
