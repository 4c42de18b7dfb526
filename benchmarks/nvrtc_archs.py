"""Tables what each kernel uses on each architecture, as NVRTC compiles it; needs no GPU.

python -m benchmarks.nvrtc_archs [--architectures 75 90]
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass

from featup_hub.ops.cuda import backend, nvrtc
from featup_hub.ops.cuda.programs import Program

ENTRY = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.S)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one kernel uses.

    Attributes:
        registers: Per thread.
        spilled: Bytes of registers stored elsewhere and loaded again, per thread.
        stack: Bytes of local memory, per thread.
    """

    registers: int
    spilled: int
    stack: int


def usage(compiler: nvrtc.Nvrtc, program: Program, architecture: int) -> dict[str, Usage]:
    """Compiles a program and reads from the log what its kernels use.

    Args:
        compiler: NVRTC.
        program: Which.
        architecture: Compute capability times ten.

    Returns:
        Usage by kernel.
    """
    source, headers, options = program.contents()
    log = compiler.compile(
        source,
        name=program.source,
        architecture=architecture,
        options=(*options, "--ptxas-options=-v"),
        headers=headers,
    ).log
    return {
        name: Usage(
            registers=_number(r"Used (\d+) registers", text),
            spilled=_number(r"(\d+) bytes spill stores", text)
            + _number(r"(\d+) bytes spill loads", text),
            stack=_number(r"(\d+) bytes stack frame", text),
        )
        for name, text in ENTRY.findall(log)
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's log was to contain {pattern!r}; got {text!r}")
    return int(found[1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", type=int, nargs="+")
    arguments = parser.parse_args()
    compiler = nvrtc.load()
    print(f"NVRTC {compiler.version[0]}.{compiler.version[1]}\n")
    print("| architecture | program | kernel | registers | spilled | stack | shared | s |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture in arguments.architectures or compiler.architectures:
        for program in backend.usual_programs():
            start = time.process_time()
            uses = usage(compiler, program, architecture)
            seconds = time.process_time() - start
            for name, use in uses.items():
                shared = program.kernels[name].shared_bytes
                print(
                    f"| sm_{architecture} | {program} | {name} | {use.registers} | "
                    f"{use.spilled} | {use.stack} | {shared} | {seconds:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
