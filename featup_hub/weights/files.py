"""Weights files: safetensors, read with their digest checked and written all or nothing.

Every file written here carries a digest of its tensors in its metadata, so that damage is seen
where no digest is pinned, too. The same tensors and metadata always make the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from featup_hub.files import sha256_of_file as digest
from featup_hub.files import sha256_of_tensors, write_atomically

__all__ = ["digest", "load_into", "metadata", "read", "write"]

_CONTENT = "content_sha256"
_PICTURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF"}
_SHOWN = 6  # names of tensors an error lists before it counts the rest


def read(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Args:
        path: The file.
        sha256: Digest the file must have, 64 hexadecimal digits. Without one, the digest of the
            tensors that :func:`write` left in the metadata is checked where there is one.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a whole safetensors file, or not the one the digest names.
    """
    path = existing(path)
    if sha256 is not None and (found := digest(path)) != sha256.lower():
        raise _damaged(path, f"a file with sha256 {sha256}", kind(path) or f"sha256 {found}")
    tensors, notes = _open(path)
    if sha256 is None and notes.get(_CONTENT, found := sha256_of_tensors(tensors)) != found:
        raise _damaged(path, f"tensors with sha256 {notes[_CONTENT]}", f"sha256 {found}")
    return tensors


def metadata(path: str | Path) -> dict[str, str]:
    """Returns what :func:`write` noted beside the tensors.

    Args:
        path: A safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a whole safetensors file.
    """
    notes = _open(existing(path))[1]
    return {key: note for key, note in sorted(notes.items()) if key not in {_CONTENT, "format"}}


def write(
    tensors: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, all or nothing.

    A failure or a kill leaves the file as it was. A link at ``path`` is replaced, not followed.

    Args:
        tensors: Tensors by name, from any device.
        path: The file to make or replace; its folder must exist.
        metadata: Notes to keep beside the tensors.

    Raises:
        TypeError: If a note is not a string.
        OSError: If the path is a folder, or its folder does not exist or cannot be written to.
    """
    from safetensors.torch import save

    path = Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        got = "it is a folder; name a file in it" if path.is_dir() else "its folder does not exist"
        raise OSError(f"cannot write weights to {path}: {got}")
    for key, note in (metadata or {}).items():
        if not isinstance(note, str):
            raise TypeError(f"metadata must be strings; got {key}={note!r}; use str(...)")
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    notes = {"format": "pt", **(metadata or {}), _CONTENT: sha256_of_tensors(whole)}
    data = memoryview(save(whole))
    end = 8 + int.from_bytes(data[:8], "little")
    # The library keeps metadata in a hash map: written by it, two runs would differ in bytes.
    header = {"__metadata__": dict(sorted(notes.items())), **json.loads(bytes(data[8:end]))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(data[end:])
        file.flush()
        os.fsync(file.fileno())


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str | Path) -> None:
    """Copies tensors into a module, strictly: same names, same shapes, or nothing at all.

    Args:
        module: The module to fill.
        tensors: Tensors by name, as its ``state_dict`` has them.
        origin: Where they come from, for the error.

    Raises:
        ValueError: If a tensor is missing, left over, of another shape or not of floating point
            where the module's is. The module is then as it was.
    """
    own = module.state_dict()
    differing = [
        f"{name} {_form(tensors[name])}, needed {_form(tensor)}"
        for name, tensor in own.items()
        if name in tensors and _form(tensors[name]) != _form(tensor)
    ]
    problems = [
        f"{label}: {listed(names)}"
        for label, names in (
            ("missing", [name for name in own if name not in tensors]),
            ("not known here", [name for name in tensors if name not in own]),
            ("of another shape or kind", differing),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{origin} does not fit {type(module).__name__}, which needs exactly its own "
            f"{len(own)} tensors; {'; '.join(problems)}; "
            "check that file and model (name, feat_dim) belong together"
        )
    # A module on the meta device has no memory to copy to and takes the tensors themselves;
    # copies, for those that were read may be views of the file.
    if meta := any(tensor.is_meta for tensor in own.values()):
        tensors = {name: tensors[name].to(tensor.dtype, copy=True) for name, tensor in own.items()}
    module.load_state_dict(tensors, assign=meta)


def existing(path: str | Path) -> Path:
    """Returns a path, ``~`` expanded, if there is a file.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If there is a folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        raise ValueError(
            f"weights must be a file; {path} is a folder; "
            f"name the file, it holds {listed(inside) if inside else 'no safetensors'}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; check the name")
    return path


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            notes = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        needed = "a whole safetensors file"
        raise _damaged(path, needed, kind(path) or f"{error}") from None


def _damaged(path: Path, needed: str, got: str) -> ValueError:
    remedy = "check the name, or fetch it again"
    if "pickle" in got:
        remedy = "convert it with: featup-hub convert IN.ckpt OUT.safetensors"
    return ValueError(f"{path} is not the weights needed: {needed}; got {got}; {remedy}")


def kind(path: Path) -> str | None:
    """Recognises what is commonly found in a weights file's place."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file it points to (run: git lfs pull)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (an error or a login page was saved under this name)"
    if start.startswith((b'{"error', b'{"message')):
        return "a server's error message"
    for magic, name in _PICTURES.items():
        if head.startswith(magic):
            return f"a {name} picture"
    if head.startswith(b"PK"):
        return "a zip file, perhaps a PyTorch pickle"
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle, which can run code and is never opened as weights"
    length = int.from_bytes(head[:8], "little")
    if size < 8 or (head[8:9] == b"{" and size < 8 + length):
        return f"a file cut off after {size} bytes"
    return None


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'}"


def listed(names: list[str]) -> str:
    """Joins names with commas; of many, the first few and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
