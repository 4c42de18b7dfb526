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
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch


class NvrtcError(RuntimeError):
    """NVRTC is missing, or rejected a program; the message includes the log."""


class Nvrtc:
    """One NVRTC library.

    Args:
        path: Its file, or its name for the system's loader.

    Attributes:
        path: As given.
        version: Version of CUDA, such as "13.0".
        architectures: Those it can compile for; 90 is compute capability 9.0.

    Raises:
        OSError: If there is no such library.
        AttributeError: If it is not NVRTC since CUDA 11.2.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}"
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        self.architectures = tuple(found)

    def compile(
        self,
        source: str,
        name: str,
        architecture: int,
        options: Sequence[str],
        headers: Mapping[str, str],
    ) -> tuple[bytes, str]:
        """Compiles a program to machine code.

        Args:
            source: CUDA C++ text.
            name: Name of the program in messages.
            architecture: Compute capability times ten, for example 90.
            options: Further options of NVRTC, for example ``-DNAME=1``.
            headers: Texts, by the name under which the source may ``#include`` them.

        Returns:
            The cubin, an ELF image; and the log: warnings, and with ``--ptxas-options=-v`` the
            resources of every kernel.

        Raises:
            NvrtcError: If NVRTC rejects the architecture, an option or the program.
        """
        lib = self._library
        texts = _strings(headers.values()), _strings(headers)
        arguments = [f"--gpu-architecture=sm_{architecture}", *options]
        program = ctypes.c_void_p()
        status = lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), len(headers), *texts
        )
        self._check(status)
        try:
            status = lib.nvrtcCompileProgram(program, len(arguments), _strings(arguments))
            log = self._output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise NvrtcError(
                    f"NVRTC {self.version} could not compile {name} for sm_{architecture}: "
                    f"{self._describe(status)}\n{log}"
                )
            return self._output(program, "CUBIN"), log
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(self._library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        self._check(self._library[f"nvrtcGet{what}"](program, content))
        return content.raw

    def _describe(self, status: int) -> str:
        return (self._library.nvrtcGetErrorString(status) or b"unknown error").decode()

    def _check(self, status: int) -> None:
        if status:
            raise NvrtcError(f"NVRTC at {self.path} failed: {self._describe(status)}")


@functools.cache
def load() -> Nvrtc:
    """Loads NVRTC, once for the process: torch's own library if it has one.

    Raises:
        NvrtcError: If there is none; the message lists the places searched.
    """
    tried = []
    for candidate in search_path():
        try:
            _load_builtins(candidate)
            return Nvrtc(candidate)
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
                yield from map(str, (package / folder).glob(soname))
        yield soname
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield from map(str, Path(home, "lib64").glob("libnvrtc.so"))
            yield from map(str, sorted(Path(home, "bin").glob("nvrtc64_*_0.dll")))
    yield "libnvrtc.so"


def _load_builtins(candidate: str) -> None:
    """Loads NVRTC's second library, which NVRTC itself would search on the system's path."""
    if Path(candidate).is_absolute():
        for path in Path(candidate).parent.glob("libnvrtc-builtins.so.*[0-9]"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _strings(texts: Collection[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
