"""``featup-hub env``: facts about this machine for a bug report."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from featup_hub import __version__

if TYPE_CHECKING:
    from featup_hub.ops.choice import ImplementationStatus

__all__ = ["add_parser", "implementation_lines"]

_PACKAGES = ("timm", "huggingface_hub", "safetensors", "pillow", "numpy")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "env",
        help="show versions and devices, for a bug report",
        description="Shows the versions of the packages, the devices, and for each device how "
        "the upsampling is computed and why. On a GPU, compiles missing kernels.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import torch

    from featup_hub.ops import implementations

    statuses = implementations()
    versions = {"featup_hub": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__}  # includes the CUDA version of the build
    versions |= {name: _version(name) for name in _PACKAGES}
    if args.json:
        content: dict[str, Any] = {
            "versions": versions,
            "platform": platform.platform(),
            "implementations": [asdict(status) for status in statuses],
        }
        print(json.dumps(content, indent=2, default=str))
        return 0
    for name, number in versions.items():
        print(f"{name}: {number}")
    print(f"platform: {platform.platform()}")
    print(*map(implementation_lines, statuses), sep="\n")
    return 0


def implementation_lines(status: ImplementationStatus) -> str:
    """Describes how a device computes, and where its compiled kernels are."""
    return "\n".join([str(status), *(f"  {cubin}" for cubin in status.cubins)])


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
