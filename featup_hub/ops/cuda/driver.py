"""Loads and launches compiled kernels through the CUDA driver, on torch's streams.

The driver's library comes with the graphics driver. Calls go through :mod:`ctypes`. They use each
device's primary context, as torch does, so memory and streams are shared. Errors contain the
driver's message.

Source: CUDA toolkit documentation, "CUDA Driver API".
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

CAPTURE_MODE_RELAXED = 2  # a CUstreamCaptureMode
# Faults of any work queued earlier; the driver reports them at the next call.
ASYNCHRONOUS_ERRORS = {700, 702, 710, *range(714, 720)}


class CudaDriverError(RuntimeError):
    """The CUDA driver is missing or refused a call."""


class Function(NamedTuple):
    """A kernel, loaded on a device: its name, the device's index, the driver's handle."""

    name: str
    device: int
    handle: int


class CudaDriver:
    """The CUDA driver of this machine.

    Raises:
        CudaDriverError: If there is no driver.
    """

    def __init__(self) -> None:
        name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
        try:
            self._cuda = ctypes.CDLL(name)
        except OSError as error:
            raise CudaDriverError(
                f"the CUDA driver's library could not be loaded ({error}); "
                "install an NVIDIA driver, or use impl='torch'"
            ) from error
        self._check(self._cuda.cuInit(0), "cuInit")
        self._primary_context = functools.cache(self._retain_context)

    def load(self, device: int, image: bytes, names: Iterable[str]) -> dict[str, Function]:
        """Loads a cubin on a device and returns its kernels by name.

        Raises:
            CudaDriverError: If the driver rejects the image or a name is missing from it.
        """
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        functions = {}
        # Other modes forbid loading during the capture of a CUDA graph.
        mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
        with self._context(device):
            self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
            try:
                self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), image), "loading")
                for name in names:
                    status = self._cuda.cuModuleGetFunction(
                        ctypes.byref(handle), module, name.encode()
                    )
                    self._check(status, name)
                    functions[name] = Function(name, device, handle.value or 0)
            finally:
                self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        return functions

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[int],
    ) -> None:
        """Queues a kernel on torch's current stream; ``arguments`` are addresses and numbers.

        Raises:
            CudaDriverError: If the driver rejects the launch.
        """
        values = pack(arguments)
        stream = torch.cuda.current_stream(function.device).cuda_stream
        with self._context(function.device):
            status = self._cuda.cuLaunchKernel(
                ctypes.c_void_p(function.handle),
                *grid,
                *(threads, 1, 1),
                shared_bytes,
                ctypes.c_void_p(stream),
                addresses(values),
                None,
            )
        self._check(status, function.name)

    @contextlib.contextmanager
    def _context(self, device: int) -> Iterator[None]:
        """Makes a device's primary context current in this thread.

        A thread that torch has not used on the device yet, such as one of autograd's, has another
        context or none.
        """
        context = ctypes.c_void_p(self._primary_context(device))
        self._check(self._cuda.cuCtxPushCurrent_v2(context), f"device {device}")
        try:
            yield
        finally:
            self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _retain_context(self, index: int) -> int:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(device), index), f"device {index}")
        status = self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self._check(status, f"the context of device {index}")
        return context.value or 0

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            words = (text.value or b"unknown error").decode(errors="replace")
            if status in ASYNCHRONOUS_ERRORS:
                raise CudaDriverError(
                    f"an operation queued earlier on this device failed, CUDA driver error "
                    f"{status}: {words}; it was noticed in {what}; run with "
                    "CUDA_LAUNCH_BLOCKING=1 to see which operation it was"
                )
            raise CudaDriverError(f"CUDA driver error {status} in {what}: {words}")


def pack(arguments: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Returns a kernel's arguments in memory, eight bytes each.

    A kernel reads the first four bytes of a number. They are its lower half, because all machines
    that CUDA supports are little-endian.
    """
    return (ctypes.c_int64 * len(arguments))(*arguments)


def addresses(values: ctypes.Array[ctypes.c_int64]) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the addresses of packed arguments, as the driver takes them."""
    first = ctypes.addressof(values)
    return (ctypes.c_void_p * len(values))(*range(first, first + ctypes.sizeof(values), 8))


open_driver = functools.cache(CudaDriver)  # once per process
