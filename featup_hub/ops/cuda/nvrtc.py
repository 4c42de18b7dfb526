"""Compiles CUDA C++ to machine code with NVRTC, the compiler library that comes with torch.

No nvcc, no headers, no build step: every CUDA build of torch depends on NVRTC and loads it.
Calls go through :mod:`ctypes`; nothing is loaded before :func:`load` is called.

Source: CUDA toolkit documentation, "NVRTC" (11.2 to 13.0).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Compilation", "Nvrtc", "NvrtcError", "load", "search_path"]


class NvrtcError(RuntimeError):
    """NVRTC is missing, or rejected a program; the message includes the log."""


class Compilation(NamedTuple):
    """NVRTC's output for a program.

    Attributes:
        image: The cubin, an ELF image.
        log: Its warnings, and with ``--ptxas-options=-v`` the resources of every kernel.
    """

    image: bytes
    log: str


class Nvrtc:
    """One loaded NVRTC library.

    Args:
        library: The library, loaded.
        path: Its file, or its name for the system's loader.

    Attributes:
        path: As given.
        version: Major and minor version of CUDA.
    """

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._library = library
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.path = path
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    @functools.cached_property
    def architectures(self) -> tuple[int, ...]:
        """Architectures this version can compile for: 90 is compute capability 9.0."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return tuple(found)

    def compile(
        self,
        source: str,
        *,
        name: str,
        architecture: int,
        options: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Compilation:
        """Compiles a program to machine code.

        Args:
            source: CUDA C++ text.
            name: Name of the program in messages.
            architecture: Compute capability times ten, for example 90.
            options: Further options of NVRTC, for example ``-DNAME=1``.
            headers: Texts the source may ``#include`` by name.

        Returns:
            The cubin and the log.

        Raises:
            NvrtcError: If NVRTC rejects the architecture, an option or the program.
        """
        lib = self._library
        names = [key.encode() for key in headers or {}]
        texts = [text.encode() for text in (headers or {}).values()]
        arguments = [f"--gpu-architecture=sm_{architecture}", *options]
        program = ctypes.c_void_p()
        self._check(
            lib.nvrtcCreateProgram(
                ctypes.byref(program),
                source.encode(),
                name.encode(),
                len(names),
                _strings(texts),
                _strings(names),
            )
        )
        try:
            status = lib.nvrtcCompileProgram(
                program, len(arguments), _strings([text.encode() for text in arguments])
            )
            if status:
                raise NvrtcError(
                    f"NVRTC {self.version[0]}.{self.version[1]} could not compile {name} for "
                    f"sm_{architecture}: {self._describe(status)}\n{self._log(program)}"
                )
            size = ctypes.c_size_t()
            self._check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)))
            cubin = ctypes.create_string_buffer(size.value)
            self._check(lib.nvrtcGetCUBIN(program, cubin))
            return Compilation(cubin.raw, self._log(program))
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._check(self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        self._check(self._library.nvrtcGetProgramLog(program, log))
        return log.value.decode(errors="replace").strip()

    def _describe(self, status: int) -> str:
        return (self._library.nvrtcGetErrorString(status) or b"unknown error").decode()

    def _check(self, status: int) -> None:
        if status:
            raise NvrtcError(f"NVRTC at {self.path} failed: {self._describe(status)}")


@functools.cache
def load() -> Nvrtc:
    """Loads NVRTC, once for the process.

    Returns:
        torch's own library if it has one; else the best installed one.

    Raises:
        NvrtcError: If there is none; the message lists the places searched.
    """
    tried = []
    for candidate in search_path():
        try:
            _load_builtins(candidate)
            return Nvrtc(ctypes.CDLL(candidate), candidate)
        except (OSError, AttributeError) as error:  # absent; or no NVRTC since CUDA 11.2
            tried.append(f"  {candidate}: {error}")
    raise NvrtcError(
        "the CUDA kernels are compiled by NVRTC, which was not found; install a CUDA build of "
        "torch, or the package nvidia-cuda-nvrtc, or set CUDA_HOME; tried:\n" + "\n".join(tried)
    )


def search_path() -> Iterator[str]:
    """Yields possible locations of NVRTC: torch's own library first, the system's last.

    A cubin runs on drivers of its own major version, so torch's comes first. torch's library is in
    a separate wheel; loading the file again returns the loaded library.
    """
    majors = [torch.version.cuda.split(".")[0]] if torch.version.cuda else ["13", "12"]
    packages = [Path(torch.__file__).parent.parent, *map(Path, sys.path)]
    for major in majors:
        version = "11.2" if major == "11" else major  # all of CUDA 11.2 to 11.8 are called 11.2
        digits = version.replace(".", "").ljust(3, "0")
        soname = f"nvrtc64_{digits}_0.dll" if os.name == "nt" else f"libnvrtc.so.{version}"
        for package in dict.fromkeys(packages):
            for folder in (f"nvidia/cu{major}/lib", "nvidia/cuda_nvrtc/lib"):
                yield from map(str, _existing(package / folder / soname))
        yield soname
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield from map(str, _existing(Path(home, "lib64", "libnvrtc.so")))
            yield from map(str, sorted(Path(home, "bin").glob("nvrtc64_*_0.dll")))
    yield "libnvrtc.so"


def _existing(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def _load_builtins(candidate: str) -> None:
    """Loads NVRTC's second library, which NVRTC itself would search on the system's path."""
    if Path(candidate).is_absolute():
        for path in Path(candidate).parent.glob("libnvrtc-builtins.so.*[0-9]"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _strings(texts: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*texts)
