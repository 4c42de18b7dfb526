"""Reads weights files: safetensors, or files of ``torch.save``.

Code in a file is never run: PyTorch's loader accepts only tensors and plain containers.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from featup_hub.weights.files import existing, kind, read

# Keys of the weights in checkpoints of timm, Lightning, DINO and MAE, and prefixes of names that
# torch.compile, DistributedDataParallel and DINO add.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.", "backbone.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Reads a network's tensors from a file.

    Args:
        path: A safetensors file, or a ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` of ``torch.save``:
            a state dict, or a checkpoint with one.

    Returns:
        Tensors by name, without the prefixes of wrappers.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file, is damaged, or would run code.
    """
    path = existing(path)
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    loaded, damage = (read(path), "") if is_safetensors else _unpickle(path)
    content = loaded if isinstance(loaded, dict) else {}
    while inside := [content[key] for key in _KEYS if isinstance(content.get(key), dict)]:
        content = inside[0]
    tensors = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
    for prefix in _PREFIXES:
        inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if 2 * len(inner) > len(tensors):  # a few others may be a head or a loss
            tensors = inner
    if not tensors:
        raise ValueError(
            f"{path} must hold a network's weights, as safetensors or as torch.save writes a "
            f"state dict; got {damage or f'{type(loaded).__name__} without tensors'}; "
            "check the file, or save the network's state_dict() again"
        )
    return tensors


def _unpickle(path: Path) -> tuple[object, str]:
    """Returns the content of a pickle, or None and why it cannot be read."""
    # timm's and DINO's trainers store their arguments in a Namespace, a plain container.
    allowed = getattr(torch.serialization, "safe_globals", None)  # PyTorch 2.5 and later
    try:
        if zipfile.is_zipfile(path):  # PyTorch's loader does not compare checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    return None, f"a damaged file: {damaged} fails its checksum"
        with allowed([argparse.Namespace]) if allowed else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True), ""
    except Exception as error:  # a damaged archive or pickle can raise any exception
        what = kind(path) or "no file of torch.save"
        if what.startswith("a zip file"):
            what = f"a damaged file ({type(error).__name__})"
            if isinstance(error, pickle.UnpicklingError):  # whose text advises to run the code
                what = "a pickle with more than tensors in it, which may run code when opened"
        return None, what
