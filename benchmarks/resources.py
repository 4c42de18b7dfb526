"""Which registers and shared memory do the fused kernels take, and how many blocks fit then?

Compiles every program for every architecture with nvcc and prints a Markdown table. Needs the
CUDA toolkit, no GPU: ``python -m benchmarks.resources [architecture ...]``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from featup_hub.ops.cuda import backend, programs
from featup_hub.ops.cuda.programs import Program

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Of a multiprocessor: threads, and shared memory in KiB (one of which each block loses from
# sm_80 on). Source: CUDA C++ programming guide 13.0, table of compute capabilities.
LIMITS = {
    75: (1024, 64),
    80: (2048, 164),
    86: (1536, 100),
    89: (1536, 100),
    90: (2048, 228),
    100: (2048, 228),
    120: (1536, 100),
}
REGISTERS = 65536
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What ptxas reports of a kernel.

    Attributes:
        name: The kernel.
        registers: Per thread.
        spilled: Bytes moved to local memory and back.
        threads: Of a block.
        shared_bytes: Of a block.
    """

    name: str
    registers: int
    spilled: int
    threads: int
    shared_bytes: int

    def blocks(self, architecture: int) -> int:
        """Returns how many blocks a multiprocessor holds at a time."""
        threads, shared = LIMITS[architecture]
        warps = -(-self.threads // 32)
        reserved = 1024 if architecture >= 80 else 0
        return min(
            REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps),
            shared * 1024 // (self.shared_bytes + reserved) if self.shared_bytes else 32,
            threads // (32 * warps),
        )


def resources(program: Program, architecture: int, compiler: str = "nvcc") -> list[Resources]:
    """Compiles a program and returns its kernels' resources.

    Raises:
        RuntimeError: If nvcc rejects it, or warns.
    """
    source = Path(programs.__file__).parent / "csrc" / program.source
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, f"-arch=sm_{architecture}", f"-D{program.define}", *programs.OPTIONS]
        command += ["-Xptxas", "-v", "-cubin", "-o", f"{folder}/out.cubin", str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or "warning" in result.stderr:
        raise RuntimeError(result.stderr)
    found = []
    for match in REPORT.finditer(result.stderr):
        kernel = program.kernels[match["name"]]
        found.append(
            Resources(
                name=match["name"],
                registers=int(match["registers"]),
                spilled=int(match["stores"]) + int(match["loads"]),
                threads=kernel.threads,
                shared_bytes=kernel.shared_bytes,
            )
        )
    return sorted(found, key=lambda kernel: kernel.name)


def main(architectures: list[int]) -> None:
    """Prints registers / blocks per multiprocessor, a row per kernel."""
    print(
        "| kernel | type | threads | shared | "
        + " | ".join(f"sm_{a}" for a in architectures)
        + " |"
    )
    print("|---" * (4 + len(architectures)) + "|")
    for program in backend.usual_programs():
        columns = [resources(program, architecture) for architecture in architectures]
        kind = {"JBU_TYPE=0": "f32", "JBU_TYPE=1": "f16", "JBU_TYPE=2": "bf16"}
        for row in zip(*columns, strict=True):
            cells = [
                f"{kernel.registers} / {kernel.blocks(architecture)}"
                + (f" (spills {kernel.spilled})" if kernel.spilled else "")
                for kernel, architecture in zip(row, architectures, strict=True)
            ]
            first = row[0]
            fixed = [first.name, kind.get(program.define, ""), first.threads, first.shared_bytes]
            print("| " + " | ".join(map(str, fixed + cells)) + " |", flush=True)


if __name__ == "__main__":
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is needed to compile; install the CUDA toolkit and put it on the PATH")
    main([int(text) for text in sys.argv[1:]] or list(ARCHITECTURES))
