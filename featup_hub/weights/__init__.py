"""Sources of weights: a file of the user, the folder of shipped files, the Hub.

Shipped files are safetensors. Their digest is in the registry and checked on every load.
timm loads its own weights, see :mod:`featup_hub.backbones`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from featup_hub.registry import UPSAMPLERS, WeightFile, shipped_upsampler
from featup_hub.weights.checkpoints import read_state
from featup_hub.weights.files import digest, existing, load_into, metadata, read, write
from featup_hub.weights.hub import download, explained
from featup_hub.weights.upstream import ConvertedCheckpoint, convert, convert_upstream, split_norm

__all__ = [
    "ConvertedCheckpoint",
    "convert",
    "convert_upstream",
    "digest",
    "download",
    "explained",
    "load",
    "load_into",
    "metadata",
    "read",
    "read_state",
    "resolve",
    "shipped_folder",
    "split_norm",
    "write",
]


def load(source: WeightFile | str | Path) -> dict[str, Tensor]:
    """Reads a shipped file and checks its digest, or reads a safetensors file of the user.

    Args:
        source: A row of the registry, the name of a shipped upsampler, or a file.

    Raises:
        FileNotFoundError: If the user's file does not exist.
        ValueError: If the file is damaged or has another digest.
        RuntimeError: If the shipped file is missing.
    """
    shipped = _shipped(source)
    return read(resolve(source), sha256=None if shipped is None else shipped.sha256)


def resolve(source: WeightFile | str | Path) -> Path:
    """Returns the existing file that :func:`load` reads; raises its errors."""
    if (shipped := _shipped(source)) is not None:
        path = shipped_folder() / shipped.filename
        if not path.is_file():
            raise RuntimeError(
                f"needed {shipped.filename}; it is not in the shipped folder {path.parent}; "
                "install the package again, or give a file of your own, on the command line by "
                "--model NAME=FILE"
            )
        return path
    path = Path(str(source)).expanduser()
    if not path.suffix and not path.exists():
        raise FileNotFoundError(
            f"no weights file {path}; check the name; shipped are {', '.join(UPSAMPLERS)}"
        )
    return existing(path)


def _shipped(source: WeightFile | str | Path) -> WeightFile | None:
    return source if isinstance(source, WeightFile) else shipped_upsampler(str(source))


def shipped_folder() -> Path:
    """Returns the folder of shipped weights, in a wheel or a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights_data"
    return installed if installed.is_dir() else package.parent / "weights"
