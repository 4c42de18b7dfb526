"""Where weights come from: an explicit path, the shipped folder, the Hub's cache, the network.

Files are safetensors, their digest is checked on every load, and they fit exactly or not at all.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from featup_hub.registry import WeightFile, shipped_upsampler
from featup_hub.weights.files import digest, existing, load_into, metadata, read, write
from featup_hub.weights.hub import cached_digest, check_name, download
from featup_hub.weights.upstream import ConvertedCheckpoint, convert, convert_upstream, split_norm

__all__ = [
    "ConvertedCheckpoint",
    "cached_digest",
    "convert",
    "convert_upstream",
    "digest",
    "download",
    "load",
    "load_into",
    "metadata",
    "read",
    "resolve",
    "shipped_folder",
    "split_norm",
    "write",
]


def load(file: WeightFile, *, path: str | Path | None = None) -> dict[str, Tensor]:
    """Finds a model's file and reads it, its digest checked.

    Args:
        file: Row of the registry.
        path: A file of the user's own to read in its place, to which the row's digest does not
            apply; or the name of a shipped upsampler.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If the file is damaged or not the one the row names.
        RuntimeError: If the file is nowhere to be had.
    """
    file, path = _named(file, path)
    found = resolve(file, path=path)
    if path is not None:
        return read(found)
    return read(found, sha256=file.sha256 or cached_digest(found))


def resolve(file: WeightFile, *, path: str | Path | None = None) -> Path:
    """Finds a model's file: explicit path, shipped folder, Hub cache, network; in this order.

    Args:
        file: Row of the registry.
        path: A file of the user's own to take in its place, or the name of a shipped upsampler.

    Returns:
        An existing file.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If ``path`` is a folder, or the row's file name leads out of its own.
        RuntimeError: If the file is nowhere to be had.
    """
    file, path = _named(file, path)
    if path is not None:
        return existing(path)
    check_name("file", file.filename)
    shipped = shipped_folder() / file.filename
    if file.repo_id is None or shipped.is_file():
        if not shipped.is_file():
            raise RuntimeError(
                f"needed {file.filename} ({file.name}); it is not in the shipped folder "
                f"{shipped.parent}, and no Hub repository is known for it; "
                "give a file of your own, on the command line by --model NAME=FILE"
            )
        return shipped
    return download(file.repo_id, file.filename, revision=file.revision, sha256=file.sha256)


def _named(file: WeightFile, path: str | Path | None) -> tuple[WeightFile, str | Path | None]:
    """Returns the row and the path to take, where ``path`` may be a name of the registry."""
    shipped = shipped_upsampler(str(path))
    return (file, path) if shipped is None else (shipped, None)


def shipped_folder() -> Path:
    """Returns the folder of weights that came with the code: a wheel's or a checkout's."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights_data"
    return installed if installed.is_dir() else package.parent / "weights"
