"""Loads and launches compiled kernels through the CUDA driver, on torch's streams.

The driver's library comes with the graphics driver. Calls go through :mod:`ctypes`. They use each
device's primary context, as torch does, so memory and streams are shared. Errors contain the
driver's message.

Source: CUDA toolkit documentation, "CUDA Driver API".
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["CudaDriver", "CudaDriverError", "Function", "Launcher", "Signature", "open_driver"]

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # a CUfunction_attribute
CAPTURE_MODE_RELAXED = 2  # a CUstreamCaptureMode
# Faults of any work queued earlier; the driver reports them at the next call.
ASYNCHRONOUS_ERRORS = {700, 702, 710, *range(714, 720)}
# A kernel needs permission for more.
DEFAULT_SHARED_BYTES = 48 * 1024


class CudaDriverError(RuntimeError):
    """The CUDA driver is missing or refused a call."""


class Signature(threading.local):
    """A kernel's parameters, packed like a C struct.

    A launch takes microseconds, so every thread reuses one buffer.

    Args:
        codes: One letter of :mod:`struct` per parameter: P pointer, i int, q long long,
            f float.

    Attributes:
        offsets: Offset of each parameter, in bytes.

    Example:
        >>> Signature("Piq").offsets
        (0, 8, 16)
    """

    def __init__(self, codes: str) -> None:
        self._struct = struct.Struct("@" + codes)
        self._buffer = ctypes.create_string_buffer(self._struct.size)
        base = ctypes.addressof(self._buffer)
        self.offsets = tuple(
            struct.calcsize("@" + codes[: index + 1]) - struct.calcsize(code)
            for index, code in enumerate(codes)
        )
        pointers = [base + offset for offset in self.offsets]
        self._pointers = (ctypes.c_void_p * len(codes))(*pointers)

    def pack(self, arguments: Sequence[float]) -> ctypes.Array[ctypes.c_void_p]:
        """Returns addresses of the packed arguments, valid until this thread packs again."""
        self._struct.pack_into(self._buffer, 0, *arguments)
        return self._pointers


@dataclass(frozen=True)
class Function:
    """One kernel, loaded on one device.

    Attributes:
        name: Its name in the source.
        device: Index of the device.
        handle: The driver's handle.
        signature: Its parameters.
    """

    name: str
    device: int
    handle: int
    signature: Signature


class Launcher(Protocol):
    """The driver's interface for the operations; tests use another implementation."""

    def load(self, device: int, image: bytes, kernels: dict[str, str]) -> dict[str, Function]:
        """Loads a cubin on a device; ``kernels`` maps names to :class:`Signature` letters."""

    def current_stream(self, device: int) -> int:
        """Returns torch's current stream."""

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[float],
    ) -> None:
        """Queues a kernel on a stream of its device."""


class CudaDriver:
    """The CUDA driver of this machine.

    Args:
        library: Name of its library.

    Raises:
        CudaDriverError: If there is no driver.
    """

    def __init__(self, library: str | None = None) -> None:
        name = library or ("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        try:
            self._cuda = ctypes.CDLL(name)
        except OSError as error:
            raise CudaDriverError(
                f"the CUDA driver's library could not be loaded ({error}); "
                "install an NVIDIA driver, or use impl='torch'"
            ) from error
        self._check(self._cuda.cuInit(0), "cuInit")
        self._contexts: dict[int, int] = {}
        self._shared_bytes: dict[int, int] = {}

    def load(self, device: int, image: bytes, kernels: dict[str, str]) -> dict[str, Function]:
        """Loads a cubin on a device and looks up its kernels.

        Args:
            device: Index of the device in torch.
            image: The cubin.
            kernels: Names and their :class:`Signature` letters.

        Returns:
            The kernels by name.

        Raises:
            CudaDriverError: If the driver rejects the image or a name is missing from it.
        """
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        functions = {}
        pushed = self._enter(device)
        # Other modes forbid loading during the capture of a CUDA graph.
        mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
        self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), image), "loading")
            for name, codes in kernels.items():
                self._check(
                    self._cuda.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()),
                    name,
                )
                functions[name] = Function(name, device, handle.value or 0, Signature(codes))
        finally:
            self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
            if pushed:
                self._leave()
        return functions

    def current_stream(self, device: int) -> int:
        """Returns the handle of torch's current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[float],
    ) -> None:
        """Queues a kernel on a stream; returns at once.

        Args:
            function: From :meth:`load`.
            grid: Blocks along x, y, z.
            block: Threads along x, y, z.
            shared_bytes: Dynamic shared memory of a block.
            stream: Handle of a stream of the function's device.
            arguments: One number or address per letter of its signature.

        Raises:
            CudaDriverError: If the driver rejects the launch.
        """
        parameters = function.signature.pack(arguments)
        pushed = self._enter(function.device)
        try:
            self._allow(function, shared_bytes)
            status = self._cuda.cuLaunchKernel(
                ctypes.c_void_p(function.handle),
                *grid,
                *block,
                shared_bytes,
                ctypes.c_void_p(stream),
                parameters,
                None,
            )
        finally:
            if pushed:
                self._leave()
        if status:
            self._check(status, function.name)

    def _allow(self, function: Function, shared_bytes: int) -> None:
        """Raises a kernel's limit of dynamic shared memory if it needs more."""
        if shared_bytes > self._shared_bytes.get(function.handle, DEFAULT_SHARED_BYTES):
            status = self._cuda.cuFuncSetAttribute(
                ctypes.c_void_p(function.handle), MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )
            self._check(status, f"{function.name} with {shared_bytes} bytes of shared memory")
            self._shared_bytes[function.handle] = shared_bytes

    def _enter(self, index: int) -> bool:
        """Makes a device's primary context current in this thread; False if it is already.

        A thread that torch has not used on the device yet, such as one of autograd's, has another
        context or none.
        """
        context = self._contexts.get(index) or self._primary_context(index)
        current = ctypes.c_void_p()
        status = self._cuda.cuCtxGetCurrent(ctypes.byref(current))
        if current.value == context:
            return False
        self._check(
            status or self._cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(context)), f"device {index}"
        )
        return True

    def _leave(self) -> None:
        self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _primary_context(self, index: int) -> int:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(device), index), f"device {index}")
        status = self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self._check(status, f"the context of device {index}")
        self._contexts[index] = context.value or 0
        return self._contexts[index]

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


@functools.cache
def open_driver() -> CudaDriver:
    """Returns the machine's driver, opened once per process."""
    return CudaDriver()
