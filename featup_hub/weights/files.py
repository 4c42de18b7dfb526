"""Weights files: safetensors, read with a check of their digest and written atomically.

Every file written here has a digest of its tensors in its metadata, to detect damage of files
without a pinned digest. The same tensors and metadata always give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from featup_hub.files import sha256_of_file, sha256_of_tensors, write_atomically
from featup_hub.registry import UPSAMPLERS, WeightFile

_CONTENT = "content_sha256"
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file (run: git lfs pull)",
    **dict.fromkeys(
        (b"<!doctype", b"<html", b"<?xml", b"<head"),
        "a web page (an error or a login page was saved under this name)",
    ),
    b"pk": "a zip file, perhaps a PyTorch pickle",
    **dict.fromkeys(
        (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"),  # its protocols
        "a Python pickle, which can run code and is never opened as weights",
    ),
}
"""How files that are not weights begin, in lower case."""


def load(source: WeightFile | str | Path) -> dict[str, Tensor]:
    """Reads a shipped file and checks its digest, or reads a safetensors file of the user.

    ``source`` is a row of the registry, the name of a shipped upsampler, a file, or a folder of
    ``save_pretrained``. Raises as :func:`read`, and RuntimeError if the shipped file is missing.
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
    if isinstance(source, str) and not Path(source).suffix and not Path(source).exists():
        raise FileNotFoundError(
            f"no weights file {source}; check the name; shipped are {', '.join(UPSAMPLERS)}"
        )
    path = Path(cast("str | Path", source)).expanduser()
    inside = path / "model.safetensors"  # in a folder of save_pretrained
    return inside if inside.is_file() else existing(path)


def _shipped(source: WeightFile | str | Path) -> WeightFile | None:
    return source if isinstance(source, WeightFile) else UPSAMPLERS.get(str(source))


def shipped_folder() -> Path:
    """Returns the folder of shipped weights, in a wheel or a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights_data"
    return installed if installed.is_dir() else package.parent / "weights"


def read(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Args:
        path: The file.
        sha256: Digest the file must have, 64 hexadecimal digits. Default: check the digest of the
            tensors in the metadata, if :func:`write` stored one.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete safetensors file, or has another digest.
    """
    path = existing(path)
    if sha256 is not None and (found := sha256_of_file(path)) != sha256.lower():
        raise _damaged(path, f"a file with sha256 {sha256}", kind(path) or f"sha256 {found}")
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = (file.metadata() or {}).get(_CONTENT)
    if sha256 is None and stored and (found := sha256_of_tensors(tensors)) != stored:
        raise _damaged(path, f"tensors with sha256 {stored}", f"sha256 {found}")
    return tensors


def metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a file of :func:`write`; raises as :func:`read`."""
    with _opened(existing(path)) as file:
        notes = file.metadata() or {}
    return {key: note for key, note in sorted(notes.items()) if key not in {_CONTENT, "format"}}


def write(
    tensors: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically, see :func:`featup_hub.files.write_atomically`.

    Args:
        tensors: Tensors by name, from any device.
        path: The file to make or replace; its folder must exist.
        metadata: Metadata of the file.

    Raises:
        TypeError: If safetensors files have no such type of tensors, or metadata are not strings.
        OSError: If the path is a folder, or its folder does not exist or cannot be written to.
    """
    path = Path(path).expanduser()
    for key, note in (metadata or {}).items():
        if not isinstance(note, str):
            raise TypeError(f"metadata must be strings; got {key}={note!r}; use str(...)")
    # Large types first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    whole = {name: tensors[name].detach().cpu().contiguous() for name in names}
    notes = {"format": "pt", **(metadata or {}), _CONTENT: sha256_of_tensors(whole)}
    # The library's own writer copies every tensor, and stores metadata in an order that changes.
    header: dict[str, object] = {"__metadata__": dict(sorted(notes.items()))}
    end = 0
    for name, tensor in whole.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} has type {tensor.dtype}; safetensors files have no such type")
        place = [end, end := end + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in whole.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def split_norm(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Splits the tensors of a converted checkpoint into the upsampler's and the norm's."""
    norm = {n.removeprefix("norm."): t for n, t in tensors.items() if n.startswith("norm.")}
    return {n: t for n, t in tensors.items() if not n.startswith("norm.")}, norm or None


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str | Path) -> None:
    """Copies tensors into a module strictly: names and shapes must be equal.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape, or an integer in place of
            floating point; it names their ``origin``. The module is then unchanged.
    """
    own = module.state_dict()
    if problems := differences(tensors, {name: _form(tensor) for name, tensor in own.items()}):
        raise ValueError(
            f"{origin} does not fit {type(module).__name__}, which needs exactly its own "
            f"{len(own)} tensors; {problems}; "
            "check that file and model (name, feat_dim) belong together"
        )
    # A module on the meta device has no memory to copy to, so it gets the tensors: cloned, because
    # tensors read from a file may be views of it.
    if meta := any(tensor.is_meta for tensor in own.values()):
        tensors = {name: tensors[name].to(tensor.dtype, copy=True) for name, tensor in own.items()}
    module.load_state_dict(tensors, assign=meta)


def differences(tensors: Mapping[str, Tensor], needed: Mapping[str, str]) -> str:
    """Describes how tensors differ from the names and shapes needed; "" if they do not."""
    return listed_problems(
        {
            "missing": [name for name in needed if name not in tensors],
            "not known here": [name for name in tensors if name not in needed],
            "of another shape or kind": [
                f"{name} {_form(tensors[name])}, needed {form}"
                for name, form in needed.items()
                if name in tensors and _form(tensors[name]) != form
            ],
        }
    )


def listed_problems(problems: Mapping[str, Sequence[str]]) -> str:
    """Joins kinds of problems with their counts and the first few names of each."""
    return "; ".join(
        f"{len(names)} {label}: {', '.join(names[:6])}"
        + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        for label, names in problems.items()
        if names
    )


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'}"


def existing(path: str | Path) -> Path:
    """Returns the path with ``~`` expanded, if it is a file; raises if it is not."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"weights must be a file; {path} is a folder; name the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; check the name")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise _damaged(path, "a whole safetensors file", kind(path) or f"{error}") from None


def _damaged(path: Path, needed: str, got: str) -> ValueError:
    remedy = "check the name, or fetch it again"
    if "pickle" in got:
        remedy = "convert it with: featup-hub convert IN.ckpt OUT.safetensors"
    return ValueError(f"{path} is not the weights needed: {needed}; got {got}; {remedy}")


def kind(path: Path) -> str | None:
    """Recognises common files that are not weights."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    return next((name for start, name in _BEGINNINGS.items() if head.startswith(start)), None)
