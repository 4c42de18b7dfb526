"""Tabulates the compiled fused kernels; needs no GPU.

python -m benchmarks.compiled_kernels [--compiler nvcc] [--architectures 75 90] [--instructions]

A row is one kernel on one architecture: registers of a thread, bytes spilled and of stack, shared
memory of a block, blocks that a multiprocessor holds. With ``--instructions`` (needs nvdisasm) its
machine instructions, and those of its largest loop: all of them, multiply-adds, loads.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from featup_hub.ops.cuda import backend, nvrtc, programs
from featup_hub.ops.cuda.programs import Kernel, Program

NVCC_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Of a multiprocessor: threads, and shared memory in KiB (one of which each block loses from sm_80
# on). Source: CUDA C++ programming guide 13.0, table of compute capabilities.
LIMITS = {
    75: (1024, 64), 80: (2048, 164), 86: (1536, 100), 89: (1536, 100), 90: (2048, 228),
    100: (2048, 228), 120: (1536, 100),
}  # fmt: skip
REGISTERS = 65536
ENTRY = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.S)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one kernel uses: registers of a thread, bytes of a thread spilled and of stack."""

    registers: int
    spilled: int
    stack: int

    def blocks(self, kernel: Kernel, architecture: int) -> int:
        """Returns how many blocks a multiprocessor of a listed architecture holds at a time."""
        threads, shared = LIMITS[architecture]
        warps = -(-kernel.threads // 32)
        reserved = 1024 if architecture >= 80 else 0
        return min(
            REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps),
            shared * 1024 // (kernel.shared_bytes + reserved) if kernel.shared_bytes else 32,
            threads // (32 * warps),
        )


def compile_with_nvrtc(program: Program, architecture: int) -> tuple[bytes, str]:
    """Returns the cubin and the log that says what every kernel uses."""
    source, headers, options = program.contents()
    options = (*options, "--ptxas-options=-v")
    return nvrtc.load().compile(source, program.source, architecture, options, headers)


def compile_with_nvcc(program: Program, architecture: int) -> tuple[bytes, str]:
    """Does the same with the CUDA toolkit's compiler; its warnings are errors."""
    source = Path(programs.__file__).parent / "csrc" / program.source
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        options = [f"-arch=sm_{architecture}", *program.contents()[2], "-Xptxas", "-v", "-cubin"]
        command = ["nvcc", *options, "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or "warning" in result.stderr:
            raise RuntimeError(result.stderr)
        return cubin.read_bytes(), result.stderr


def usage(log: str) -> dict[str, Usage]:
    """Reads from a compiler's log what its kernels use."""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"the compiler's log was to contain {pattern!r}; got {text!r}")
        return int(found[1])

    return {
        name: Usage(
            registers=number(r"Used (\d+) registers", text),
            spilled=number(r"(\d+) bytes spill stores", text)
            + number(r"(\d+) bytes spill loads", text),
            stack=number(r"(\d+) bytes stack frame", text),
        )
        for name, text in ENTRY.findall(log)
    }


def instructions(image: bytes) -> dict[str, list[str]]:
    """Returns every kernel's machine instructions in order, labels among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run(
            ["nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    kernels: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels.setdefault(start[1], [])
        elif label := re.match(r"(\.L_\w+):", line):
            current.append(label[1])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            current.append(found[1])
    return kernels


def loops(code: list[str]) -> list[list[str]]:
    """Returns the bodies of a kernel's loops: from a label to the last jump back to it."""
    labels = {text: n for n, text in enumerate(code) if text.startswith(".L_")}
    found: dict[str, int] = {}
    for n, text in enumerate(code):
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
        if jump and labels.get(jump[1], n) < n:
            found[jump[1]] = n
    return [
        [text for text in code[labels[name] : end + 1] if not text.startswith(".L_")]
        for name, end in found.items()
    ]


def count(code: list[str]) -> str:
    """Says how many instructions there are, and how many multiply, load and move."""
    words = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in code if text[:1] != "."]
    kinds = {"FFMA": "FFMA", "HMMA": "HMMA", "shared": "LDS", "global": "LDG", "MUFU": "MUFU"}
    parts = [f"{name} {sum(w.startswith(op) for w in words)}" for name, op in kinds.items()]
    return f"{len(words)} ({', '.join(parts)})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compiler", choices=("nvrtc", "nvcc"), default="nvrtc")
    parser.add_argument("--architectures", type=int, nargs="+")
    parser.add_argument("--instructions", action="store_true")
    arguments = parser.parse_args()
    for tool, wanted in (("nvcc", arguments.compiler == "nvcc"), ("nvdisasm", True)):
        if wanted and shutil.which(tool) is None and (tool == "nvcc" or arguments.instructions):
            sys.exit(f"{tool} is needed; install the CUDA toolkit and put it on the PATH")
    if arguments.compiler == "nvcc":
        make, architectures = compile_with_nvcc, NVCC_ARCHITECTURES
    else:
        make, architectures = compile_with_nvrtc, nvrtc.load().architectures
    print("| architecture | program | kernel | registers | spilled | stack | shared | blocks |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture in arguments.architectures or architectures:
        for program in backend.usual_programs():
            image, log = make(program, architecture)
            for name, use in usage(log).items():
                kernel = program.kernels[name]
                blocks = use.blocks(kernel, architecture) if architecture in LIMITS else ""
                cells = [f"sm_{architecture}", program, name, use.registers, use.spilled]
                cells += [use.stack, kernel.shared_bytes, blocks]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            if arguments.instructions:
                for name, code in instructions(image).items():
                    print(f"- {name}: {count(code)}")
                    for body in sorted(loops(code), key=len, reverse=True)[:6]:
                        print(f"  - loop: {count(body)}")


if __name__ == "__main__":
    main()
