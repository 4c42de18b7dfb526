"""The CUDA driver's launcher, against a driver that records its calls."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featup_hub.ops.cuda.driver import CudaDriver, CudaDriverError

STREAM = 0xABC


class RecordingLibrary:
    """Stands in for libcuda: succeeds, counts contexts, and keeps the bytes of every launch."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.retained: list[int] = []
        self.launches: list[dict[str, Any]] = []
        self.loaded_in: list[int] = []
        self.fail: dict[str, int] = {}
        self.capture_mode = 0
        self.loaded_while: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self.fail.get("cuInit", 0)

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = {100: b"no CUDA-capable device is detected"}.get(status, b"a reason")
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.retained.append(device.value)
        context._obj.value = 1000 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.stack.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.stack.pop()
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.capture_mode, mode._obj.value = mode._obj.value, self.capture_mode
        return 0

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:
        self.loaded_while.append(self.capture_mode)
        self.loaded_in.append(self.stack[-1])
        module._obj.value = 77
        return self.fail.get("cuModuleLoadData", 0)

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = 500 + len(name)
        return 0 if name != b"absent" else 500

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *sizes, stream, parameters, extra = rest
        assert extra is None
        call = {"function": function.value, "sizes": sizes, "stream": stream.value}
        values = [ctypes.string_at(address, 8) for address in parameters]
        self.launches.append({**call, "context": self.stack[-1], "parameters": values})
        return self.fail.get("cuLaunchKernel", 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> RecordingLibrary:
    recorder = RecordingLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: recorder)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device)
    )
    return recorder


def test_a_launch_passes_sizes_stream_and_every_argument(library):
    driver = CudaDriver()
    kernel = driver.load(0, b"image", ["fill"])["fill"]
    driver.launch(kernel, (7, 5, 3), 128, 1024, [2**45 + 1, -5, 0])
    (launch,) = library.launches
    assert (launch["function"], launch["stream"]) == (kernel.handle, STREAM)
    assert launch["sizes"] == [7, 5, 3, 128, 1, 1, 1024]
    # A pointer is read as eight bytes, an int as the first four.
    pointer, number, null = launch["parameters"]
    assert pointer == (2**45 + 1).to_bytes(8, "little")
    assert number[:4] == (-5).to_bytes(4, "little", signed=True)
    assert null == bytes(8)


def test_calls_happen_in_the_devices_own_context_and_leave_the_threads_as_it_was(library):
    driver = CudaDriver()
    near, far = (driver.load(d, b"image", ["fill"])["fill"] for d in (0, 1))
    for kernel in (near, far, far):
        driver.launch(kernel, (1, 1, 1), 1, 0, [])
    assert library.loaded_in == [1000, 1001]
    assert [launch["context"] for launch in library.launches] == [1000, 1001, 1001]
    assert [launch["stream"] for launch in library.launches] == [STREAM, STREAM + 1, STREAM + 1]
    assert library.stack == []
    assert library.retained == [0, 1]


def test_a_program_can_be_loaded_while_a_graph_is_captured(library):
    relaxed, everywhere = 2, 0
    library.capture_mode = everywhere
    CudaDriver().load(0, b"image", ["fill"])
    assert library.loaded_while == [relaxed]
    library.fail["cuModuleLoadData"] = 200
    with pytest.raises(CudaDriverError):
        CudaDriver().load(0, b"image", ["fill"])
    assert library.capture_mode == everywhere


def test_a_missing_driver_is_reported_with_the_remedy(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(CudaDriverError, match="install an NVIDIA driver, or use impl='torch'"):
        CudaDriver()


EARLIER = r"earlier .* failed.* {}: a reason; .*CUDA_LAUNCH_BLOCKING=1"


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("cuInit", 100, "error 100 in cuInit: no CUDA-capable device is detected"),
        ("cuModuleLoadData", 200, "error 200 in loading"),
        ("cuLaunchKernel", 701, "error 701 in fill: a reason"),
        *[("cuLaunchKernel", status, EARLIER.format(status)) for status in (700, 710, 716, 719)],
    ],
)
def test_errors_say_what_failed_in_the_drivers_words(library, call, status, message):
    def load_and_launch():
        driver = CudaDriver()
        driver.launch(driver.load(0, b"image", ["fill"])["fill"], (1, 1, 1), 1, 0, [])

    library.fail[call] = status
    with pytest.raises(CudaDriverError, match=message):
        load_and_launch()
    assert library.stack == []


def test_a_kernel_missing_from_the_image_is_reported(library):
    with pytest.raises(CudaDriverError, match="error 500 in absent"):
        CudaDriver().load(0, b"image", ["absent"])
