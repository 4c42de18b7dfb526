"""Compiles and loads the fused CUDA kernels, or gives the reason why they cannot run.

A program is compiled, or found in the cache, and loaded once per device and process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featup_hub.ops.cuda import cache, nvrtc
from featup_hub.ops.cuda.driver import CudaDriver, CudaDriverError, Function, open_driver

OPTIONS = ("--std=c++17",)
OLDEST_ARCHITECTURE = 70


class UnavailableError(RuntimeError):
    """The fused kernels cannot run; the message gives the reason and a remedy."""


class Kernel(NamedTuple):
    """Threads and bytes of dynamic shared memory of a kernel's blocks."""

    threads: int
    shared_bytes: int = 0


@dataclass(frozen=True)
class Program:
    """A CUDA source in ``csrc``, and how to compile it."""

    source: str  # name of the file; it may include every .cuh of the folder
    define: str  # a macro, NAME=VALUE
    kernels: Mapping[str, Kernel] = field(hash=False)

    def __str__(self) -> str:
        return f"{self.source} -D{self.define}"

    def contents(self) -> tuple[str, dict[str, str], tuple[str, ...]]:
        """Returns the source's text, the headers by name, and the compiler's options."""
        folder = Path(__file__).with_name("csrc")
        headers = {
            path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))
        }
        text = (folder / self.source).read_text(encoding="utf-8")
        return text, headers, (*OPTIONS, f"-D{self.define}")


@dataclass(frozen=True, kw_only=True)
class FusedKernels:
    """The kernels of a program, loaded on one device."""

    device: int  # its index
    multiprocessors: int  # of the device
    program: Program
    driver: CudaDriver
    functions: Mapping[str, Function]  # the kernels by name
    path: Path | None  # of their machine code; None if it is in memory only
    compiler: str  # its readable name

    def launch(
        self, name: str, grid: tuple[int, int, int], *arguments: Tensor | int | None
    ) -> None:
        """Queues a kernel on torch's current stream of the device; returns at once.

        Args:
            name: The kernel.
            grid: Blocks along x, y, z.
            arguments: Contiguous tensors on the device, numbers, or None for a null pointer.

        Raises:
            RuntimeError: If a tensor is on another device.
            ValueError: If a number has more than 32 bits.
        """
        values = [self._value(argument) for argument in arguments]
        kernel = self.program.kernels[name]
        self.driver.launch(self.functions[name], grid, kernel.threads, kernel.shared_bytes, values)

    def _value(self, argument: Tensor | int | None) -> int:
        """Returns a number, or the address of a tensor."""
        if argument is None:
            return 0
        if isinstance(argument, int):
            if argument >= 1 << 31:
                raise ValueError(
                    f"the fused kernels take sizes below 2³¹; got {argument}; split the image, or "
                    "use impl='torch'"
                )
            return argument
        if argument.get_device() != self.device:
            raise RuntimeError(
                f"all tensors must be on one device, cuda:{self.device}; got one on "
                f"{argument.device}; move it there"
            )
        return argument.data_ptr()


def prepare(program: Program, device: torch.device) -> FusedKernels:
    """Returns a program's kernels for a device.

    The first call for a device compiles them, in some seconds, if they are not in the cache.

    Raises:
        UnavailableError: If they cannot run on the device.
    """
    if torch.version.hip is not None:
        raise UnavailableError(
            "this PyTorch is built for ROCm and the fused kernels are CUDA only; impl='torch' "
            "computes the same on this device"
        )
    if device.type != "cuda":
        raise UnavailableError(
            f"the fused kernels need tensors on a CUDA device; got {device}; move them, or use "
            "impl='torch', which runs anywhere"
        )
    return _load(program, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # exceptions are not cached: the next call tries again
def _load(program: Program, index: int) -> FusedKernels:
    major, minor = torch.cuda.get_device_capability(index)
    compiled = _compile_once(program, 10 * major + minor)
    if isinstance(compiled, str):
        raise UnavailableError(compiled)
    image, path, compiler = compiled
    try:
        driver = open_driver()
        functions = driver.load(index, image, program.kernels)
    except CudaDriverError as error:
        raise UnavailableError(str(error)) from error
    return FusedKernels(
        device=index,
        multiprocessors=torch.cuda.get_device_properties(index).multi_processor_count,
        program=program,
        driver=driver,
        functions=functions,
        path=path,
        compiler=compiler,
    )


@functools.cache  # failures are cached, too: they take seconds and would repeat
def _compile_once(program: Program, architecture: int) -> tuple[bytes, Path | None, str] | str:
    try:
        return compile_program(program, architecture)
    except (UnavailableError, nvrtc.NvrtcError) as error:
        return str(error)


def compile_program(program: Program, architecture: int) -> tuple[bytes, Path | None, str]:
    """Compiles a program for a compute capability times ten, or finds it in the cache.

    Returns:
        The cubin, its file (see :func:`featup_hub.ops.cuda.cache.fetch`), and the compiler's name.

    Raises:
        UnavailableError: If the architecture is too old for the kernels, or unknown to NVRTC.
        NvrtcError: If there is no NVRTC, or it fails.
    """
    if architecture < OLDEST_ARCHITECTURE:
        raise UnavailableError(
            f"the fused kernels need compute capability {OLDEST_ARCHITECTURE / 10} or newer; "
            f"this device has {architecture / 10}; impl='torch' runs on it"
        )
    compiler = nvrtc.load()
    known = compiler.architectures
    # Machine code also runs on later minor versions of its architecture.
    fitting = [a for a in known if a <= architecture and a // 10 == architecture // 10]
    if not fitting:
        raise UnavailableError(
            f"NVRTC {compiler.version} compiles for sm_{known[0]} to sm_{known[-1]}, not for this "
            f"device's sm_{architecture}; install a PyTorch built for "
            f"{'an older' if architecture < known[0] else 'a newer'} CUDA, or use impl='torch'"
        )
    source, headers, options = program.contents()
    dependencies = source, headers, options, compiler.version
    name = cache.cubin_name(Path(program.source).stem, max(fitting), *dependencies)
    call = source, program.source, max(fitting), options, headers
    image, path = cache.fetch(name, lambda: compiler.compile(*call)[0])
    return image, path, f"NVRTC {compiler.version} ({compiler.path})"
