"""The CUDA driver's launcher, against a driver that records its calls."""

from __future__ import annotations

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from featup_hub.ops.cuda.driver import CudaDriver, CudaDriverError, Signature


class RecordingLibrary:
    """Stands in for libcuda: succeeds, counts contexts, and keeps the bytes of every launch."""

    def __init__(self) -> None:
        self.current = 0
        self.stack: list[int] = []
        self.retained: list[int] = []
        self.launches: list[dict[str, Any]] = []
        self.limits: list[tuple[int, int]] = []
        self.loaded_in: list[int] = []
        self.fail: dict[str, int] = {}
        self.sizes: tuple[int, ...] = ()
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

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.current or None
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.stack.append(self.current)
        self.current = context.value
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current = self.stack.pop()
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.capture_mode, mode._obj.value = mode._obj.value, self.capture_mode
        return 0

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:
        self.loaded_while.append(self.capture_mode)
        self.loaded_in.append(self.current)
        module._obj.value = 77
        return self.fail.get("cuModuleLoadData", 0)

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = 500 + len(name)
        return 0 if name != b"absent" else 500

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        assert attribute == 8
        self.limits.append((function.value, value))
        return self.fail.get("cuFuncSetAttribute", 0)

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *dims, shared_bytes, stream, parameters, extra = rest
        assert extra is None
        self.launches.append(
            {
                "function": function.value,
                "grid": tuple(dims[:3]),
                "block": tuple(dims[3:]),
                "shared_bytes": shared_bytes,
                "stream": stream.value or 0,
                "context": self.current,
                "parameters": [
                    ctypes.string_at(address, size)
                    for address, size in zip(parameters, self.sizes, strict=True)
                ],
            }
        )
        return self.fail.get("cuLaunchKernel", 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> RecordingLibrary:
    recorder = RecordingLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: recorder)
    return recorder


def read(pointers: Any, codes: str) -> list[float]:
    return [
        struct.unpack(code, ctypes.string_at(pointer, struct.calcsize(code)))[0]
        for code, pointer in zip(codes, pointers, strict=True)
    ]


def test_each_parameter_is_packed_at_its_natural_alignment() -> None:
    signature = Signature("PiqfiP")
    assert signature.offsets == (0, 8, 16, 24, 28, 32)
    values = [2**47 + 3, -5, 2**40 + 1, 0.5, 7, 0]
    assert read(signature.pack(values), "PiqfiP") == values


def test_threads_that_launch_the_same_kernel_do_not_share_a_buffer() -> None:
    signature = Signature("Pq")
    mine = signature.pack([1, 2])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(signature.pack, [3, 4]).result()
    assert mine[0] != other[0]
    assert read(mine, "Pq") == [1, 2]


def test_a_number_too_large_for_its_parameter_is_refused_not_cut() -> None:
    with pytest.raises(struct.error):
        Signature("i").pack([2**31])


def test_a_launch_passes_dims_stream_and_every_parameter(library: RecordingLibrary) -> None:
    library.sizes = (8, 8, 4)
    driver = CudaDriver()
    kernel = driver.load(0, b"image", {"fill": "Pqf"})["fill"]
    driver.launch(kernel, (7, 5, 3), (128, 2, 1), 1024, 0xABC, [2**45, 2**33, 1.5])
    (launch,) = library.launches
    assert launch["function"] == kernel.handle
    assert (launch["grid"], launch["block"]) == ((7, 5, 3), (128, 2, 1))
    assert (launch["shared_bytes"], launch["stream"]) == (1024, 0xABC)
    values = {"P": 2**45, "q": 2**33, "f": 1.5}
    assert launch["parameters"] == [struct.pack(code, value) for code, value in values.items()]


def test_calls_happen_in_the_devices_own_context_and_leave_the_threads_as_it_was(
    library: RecordingLibrary,
) -> None:
    library.current = 1000
    driver = CudaDriver()
    near, far = (driver.load(d, b"image", {"fill": ""})["fill"] for d in (0, 1))
    for kernel in (near, far, far):
        driver.launch(kernel, (1, 1, 1), (1, 1, 1), 0, 0, [])
    assert library.loaded_in == [1000, 1001]
    assert [launch["context"] for launch in library.launches] == [1000, 1001, 1001]
    assert library.current == 1000
    assert library.stack == []
    assert library.retained == [0, 1]


def test_a_thread_without_a_context_gets_one_for_the_call(library: RecordingLibrary) -> None:
    driver = CudaDriver()
    kernel = driver.load(0, b"image", {"fill": ""})["fill"]
    driver.launch(kernel, (1, 1, 1), (1, 1, 1), 0, 0, [])
    assert library.launches[0]["context"] == 1000
    assert library.current == 0


def test_shared_memory_above_the_default_is_asked_for_once_per_kernel(
    library: RecordingLibrary,
) -> None:
    driver = CudaDriver()
    kernels = driver.load(0, b"image", {"a": "", "bb": ""})
    for name, size in (("a", 48 * 1024), ("a", 90_000), ("a", 90_000), ("a", 1), ("bb", 60_000)):
        driver.launch(kernels[name], (1, 1, 1), (1, 1, 1), size, 0, [])
    assert library.limits == [(kernels["a"].handle, 90_000), (kernels["bb"].handle, 60_000)]


def test_a_program_can_be_loaded_while_a_graph_is_captured(library: RecordingLibrary) -> None:
    relaxed, everywhere = 2, 0
    library.capture_mode = everywhere
    CudaDriver().load(0, b"image", {"fill": ""})
    assert library.loaded_while == [relaxed]
    library.fail["cuModuleLoadData"] = 200
    with pytest.raises(CudaDriverError):
        CudaDriver().load(0, b"image", {"fill": ""})
    assert library.capture_mode == everywhere


@pytest.mark.parametrize("status", [700, 710, 716, 719])
def test_a_fault_of_earlier_work_is_not_blamed_on_the_kernel_that_meets_it(
    library: RecordingLibrary, status: int
) -> None:
    driver = CudaDriver()
    kernel = driver.load(0, b"image", {"fill": ""})["fill"]
    library.fail["cuLaunchKernel"] = status
    with pytest.raises(
        CudaDriverError, match=rf"earlier .* failed.* {status}: a reason; .*CUDA_LAUNCH_BLOCKING=1"
    ):
        driver.launch(kernel, (1, 1, 1), (1, 1, 1), 0, 0, [])


def test_a_missing_driver_is_reported_with_the_remedy() -> None:
    with pytest.raises(CudaDriverError, match="install an NVIDIA driver, or use impl='torch'"):
        CudaDriver("libno-such-driver.so.1")


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("cuInit", 100, "error 100 in cuInit: no CUDA-capable device is detected"),
        ("cuModuleLoadData", 200, "error 200 in loading"),
        ("cuLaunchKernel", 701, "error 701 in fill: a reason"),
        ("cuFuncSetAttribute", 1, "error 1 in fill with 99999 bytes of shared memory"),
    ],
)
def test_errors_say_what_failed_in_the_drivers_words(
    library: RecordingLibrary, call: str, status: int, message: str
) -> None:
    def load_and_launch() -> None:
        driver = CudaDriver()
        kernel = driver.load(0, b"image", {"fill": ""})["fill"]
        driver.launch(kernel, (1, 1, 1), (1, 1, 1), 99_999, 0, [])

    library.fail[call] = status
    with pytest.raises(CudaDriverError, match=message):
        load_and_launch()
    assert library.stack == []


def test_a_kernel_missing_from_the_image_is_reported(library: RecordingLibrary) -> None:
    with pytest.raises(CudaDriverError, match="error 500 in absent"):
        CudaDriver().load(0, b"image", {"absent": ""})
