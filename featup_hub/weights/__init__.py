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


def load(file: WeightFile, *, path: str | Path | None = None) -> dict[str, Tensor]:
    """Reads a shipped file and checks its digest, or reads a file of the user instead.

    Args:
        file: Row of the registry.
        path: A safetensors file to read instead, without the row's digest; or the name of a shipped
            upsampler.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If the file is damaged or has another digest.
        RuntimeError: If the shipped file is missing.
    """
    file, path = _named(file, path)
    return read(resolve(file, path=path), sha256=None if path is not None else file.sha256)


def resolve(file: WeightFile, *, path: str | Path | None = None) -> Path:
    """Finds a shipped file, or the user's file instead.

    Args:
        file: Row of the registry.
        path: A file to take instead, or the name of a shipped upsampler.

    Returns:
        An existing file.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If ``path`` is a folder.
        RuntimeError: If the shipped file is missing.
    """
    file, path = _named(file, path)
    if path is not None:
        if file in UPSAMPLERS.values() and not Path(path).suffix and not Path(path).exists():
            raise FileNotFoundError(
                f"no weights file {path}; check the name; shipped are {', '.join(UPSAMPLERS)}"
            )
        return existing(path)
    shipped = shipped_folder() / file.filename
    if not shipped.is_file():
        raise RuntimeError(
            f"needed {file.filename} ({file.name}); it is not in the shipped folder "
            f"{shipped.parent}; install the package again, or give a file of your own, "
            "on the command line by --model NAME=FILE"
        )
    return shipped


def _named(file: WeightFile, path: str | Path | None) -> tuple[WeightFile, str | Path | None]:
    """Returns the row and the path to take; ``path`` may be a name of the registry."""
    shipped = shipped_upsampler(str(path))
    return (file, path) if shipped is None else (shipped, None)


def shipped_folder() -> Path:
    """Returns the folder of shipped weights, in a wheel or a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights_data"
    return installed if installed.is_dir() else package.parent / "weights"
