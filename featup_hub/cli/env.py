"""Show versions and devices, for a bug report.

Shows the versions of the packages, the devices, and for each device how the upsampling is computed
and why. On a GPU, compiles missing kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict

from featup_hub import __version__

_PACKAGES = ("timm", "huggingface_hub", "safetensors", "pillow", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    from featup_hub.ops import implementations

    versions = {"featup_hub": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__}  # includes the CUDA version of the build
    versions |= {name: _version(name) for name in _PACKAGES}
    if args.json:
        content = {
            "versions": versions,
            "platform": platform.platform(),
            "implementations": [asdict(status) for status in implementations()],
        }
        print(json.dumps(content, indent=2, default=str))
        return 0
    for name, number in versions.items():
        print(f"{name}: {number}")
    print(f"platform: {platform.platform()}")
    for status in implementations():
        print(status, *(f"  {cubin}" for cubin in status.cubins), sep="\n")
    return 0


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
