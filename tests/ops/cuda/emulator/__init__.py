"""Runs the CUDA sources on the CPU, without a GPU.

g++ compiles the shipped sources against ``cuda_on_cpu.h``. The package's own launch code runs them
on CPU tensors. Every tensor has NaN on both sides: a wrong read gives NaN in the result, and a
wrong write is detected.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from featup_hub.ops.cuda import programs
from featup_hub.ops.cuda.driver import addresses, pack
from featup_hub.ops.cuda.programs import Program

HERE = Path(__file__).parent
SOURCES = Path(programs.__file__).with_name("csrc")
COMPILER = shutil.which("g++")
MARGIN = 64  # elements of NaN on either side of a tensor
CHECKS = "alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift"
# -Og: compiling takes a program's time, running it does not.
COMPILE = ("-std=c++20", "-Og", "-fPIC", "-w", f"-fsanitize={CHECKS}")

Edit = tuple[str, str, str]  # file, old text, new text
Barrier = tuple[str, int]  # file and line


class EmulationError(RuntimeError):
    """A kernel did what a device would not forgive."""


@dataclass(frozen=True)
class Emulator:
    """Compiles programs and stands in for a device.

    Attributes:
        folder: Where libraries are built; several processes may share it.
        order: Threads and blocks run 0: ascending, 1: descending, else: shuffled.
        offset: Elements by which tensors miss the alignment torch gives them.
        multiprocessors: What the device seems to have.
        architecture: What it seems to be, compute capability times ten.
        edit: A fault planted in the sources.
        barrier: A barrier left out.
    """

    folder: Path
    order: int = 2
    offset: int = 0
    multiprocessors: int = 2
    architecture: int = 90
    edit: Edit | None = None
    barrier: Barrier | None = None

    def prepare(self, program: Program, device: torch.device) -> EmulatedKernels:
        """Stands in for :func:`featup_hub.ops.cuda.programs.prepare`."""
        key = program.source, program.define, tuple(program.kernels), self.architecture
        edit = self.edit
        if edit is not None and edit[0] not in _files(program.source):
            edit = None  # another program's
        return EmulatedKernels(_build(self.folder, *key, edit), program, self)


@dataclass(frozen=True)
class EmulatedKernels:
    """A program's kernels, launched as :class:`featup_hub.ops.cuda.programs.FusedKernels` does."""

    library: ctypes.CDLL
    program: Program
    emulator: Emulator

    @property
    def multiprocessors(self) -> int:
        return self.emulator.multiprocessors

    def launch(
        self, name: str, grid: tuple[int, int, int], *arguments: Tensor | int | None
    ) -> None:
        guarded = [self._guard(x) if isinstance(x, Tensor) else x for x in arguments]
        plain = [x[1] if isinstance(x, tuple) else x for x in guarded]
        self.launch_bare(name, grid, plain)
        for index, (argument, pair) in enumerate(zip(arguments, guarded, strict=True)):
            if isinstance(argument, Tensor):
                whole, inner = pair
                argument.copy_(inner)
                inner.fill_(float("nan"))
                if not whole.isnan().all():
                    raise EmulationError(f"{name}: argument {index} was written beyond its ends")

    def launch_bare(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: Sequence[Tensor | int | None],
        *,
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """Launches on the tensors themselves, without guards; where ``block``, that block only."""
        kernel, how = self.program.kernels[name], self.emulator
        values = pack([x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments])
        file, line = how.barrier or ("", 0)
        alone = (int(block is not None), *map(ctypes.c_uint, block or (0, 0, 0)))
        path = str(Path(self.library._name).parent / file).encode()
        self.library.configure(how.order, path, line, *alone)
        launch = self.library[f"launch_{name}"]
        launch.restype = ctypes.c_char_p
        block_size = (ctypes.c_uint(kernel.threads), ctypes.c_size_t(kernel.shared_bytes))
        message = launch(*map(ctypes.c_uint, grid), *block_size, addresses(values))
        if message:
            raise EmulationError(f"{name}: {message.decode()}")

    def _guard(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Copies a tensor between NaN; returns the whole and what is inside."""
        assert tensor.is_contiguous(), "kernels take contiguous tensors"
        whole = tensor.new_full((tensor.numel() + 2 * MARGIN,), float("nan"))
        start = MARGIN + self.emulator.offset
        inner = whole[start : start + tensor.numel()].view(tensor.shape)
        return whole, inner.copy_(tensor)


@functools.cache
def _files(name: str) -> set[str]:
    """Returns a source's name and those of all headers it includes."""
    included = re.findall(r'#include "(.*)"', (SOURCES / name).read_text(encoding="utf-8"))
    return {name}.union(*map(_files, included))


@functools.cache
def _build(
    folder: Path,
    source: str,
    define: str,
    kernels: tuple[str, ...],
    architecture: int,
    edit: Edit | None,
) -> ctypes.CDLL:
    """Compiles a program, unless a process did, and loads it."""
    program = repr((source, define, kernels, architecture, edit))
    place = folder / hashlib.sha256(program.encode()).hexdigest()
    with FileLock(f"{place}.lock"):
        if not (place / "unit.so").exists():
            _compile_program(place, source, define, kernels, architecture, edit)
    return ctypes.CDLL(str(place / "unit.so"))


def _compile_program(
    place: Path,
    source: str,
    define: str,
    kernels: tuple[str, ...],
    architecture: int,
    edit: Edit | None,
) -> None:
    place.mkdir(exist_ok=True)
    for path in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")):
        shutil.copy(path, place)
    if edit is not None:
        file, text, instead = edit
        content = (place / file).read_text(encoding="utf-8")
        assert content.count(text) == 1, f"{file} has to say {text!r} once"
        (place / file).write_text(content.replace(text, instead), encoding="utf-8")
    entries = "".join(
        f'extern "C" const char* launch_{name}(unsigned x, unsigned y, unsigned z, unsigned '
        "threads, size_t shared_bytes, void** arguments) "
        f"{{ return emulator::launch<{name}>({{x, y, z}}, threads, shared_bytes, arguments); }}\n"
        for name in kernels
    )
    unit, compiled, library = place / "unit.cpp", place / "unit.o", place / "unit.so"
    unit.write_text(f'#include "{_header(place.parent)}"\n#include "{place}/{source}"\n{entries}')
    defines = f"-D{define}", f"-D__CUDA_ARCH__={architecture}0"
    _compile(*COMPILE, *defines, "-c", unit, "-o", compiled)
    # Without the checks' own library: their handlers are in cuda_on_cpu.h.
    _compile("-shared", compiled, "-o", library)


def _header(folder: Path) -> Path:
    """Compiles the header which is the same in every program, once."""
    header = folder / "cuda_on_cpu.h"
    with FileLock(f"{header}.lock"):
        if not Path(f"{header}.gch").exists():
            shutil.copy(HERE / header.name, header)
            _compile(*COMPILE, "-x", "c++-header", header, "-o", f"{header}.gch")
    return header


def _compile(*arguments: str | Path) -> None:
    result = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise EmulationError(result.stderr)
