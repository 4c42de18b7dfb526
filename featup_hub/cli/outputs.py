"""Output files of commands, checked before the work; and the outputs of ``upsample``.

A file under its final name is complete, so a stopped run resumes with the missing files. A picture
is written after its features, so a picture without features is not an output.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featup_hub import __version__
from featup_hub.cli.terminal import UsageError, explain

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "Job", "check_output", "is_finished", "make_folder", "plan", "write_features"]

FORMATS = ("safetensors", "npy")
"""Formats of features, by the suffix of the file."""

_FORMERLY = {
    "layer": "default",
    "looks": "1",
    "dtype": "float32",
    "bands": "all",
    "value_range": "full",
}
"""Values of settings that older files do not store."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to work on.

    Attributes:
        image: The file to read.
        features: The file to make.
        picture: The picture to make next to it; None for no picture.
    """

    image: Path
    features: Path
    picture: Path | None


def plan(inputs: list[Path], out: Path, suffix: str, *, picture: bool) -> list[Job]:
    """Lists the images and their output files.

    An image in a folder keeps its path relative to that folder.

    Args:
        inputs: Images, and folders to search with their subfolders.
        out: Folder of the outputs; images in it are left out of the search.
        suffix: Format of the features, one of ``FORMATS``.
        picture: Whether to plan pictures.

    Raises:
        UsageError: If a folder has no image, or two outputs would have the same name.
    """
    jobs: dict[Path, Job] = {}
    for top in inputs:
        if picture and top.is_dir() and top.resolve() == out.resolve():
            raise UsageError(
                f"pictures in {top} would be taken for images in the next run; "
                "choose another --out, or --no-picture"
            )
        for image in _images(top, out):
            place = Path(image.name) if image == top else image.relative_to(top)
            job = Job(
                image=image,
                features=out / place.with_suffix(f".{suffix}"),
                picture=out / place.with_suffix(".png") if picture else None,
            )
            other = jobs.setdefault(job.features, job).image
            if other.resolve() != image.resolve():
                raise UsageError(
                    f"every image needs an output of its own; {other} and {image} would both be "
                    f"{job.features}; rename one, or give each an --out of its own"
                )
            if job.picture is not None and job.picture.resolve() == image.resolve():
                raise UsageError(
                    f"the picture {job.picture} would replace the image; choose another --out"
                )
    return list(jobs.values())


def _images(path: Path, out: Path) -> list[Path]:
    """Returns a file, or the images of a folder without those in the folder of outputs."""
    from featup_hub.image import IMAGE_SUFFIXES, list_images

    if not path.is_dir():
        return [path]
    found = list_images(path)
    if path.resolve() in out.resolve().parents:  # pictures of an earlier run are not inputs
        found = [file for file in found if out.resolve() not in file.resolve().parents]
    if not found:
        raise UsageError(
            f"a folder of images ({' '.join(sorted(IMAGE_SUFFIXES))}) is needed; {path} holds none"
        )
    return found


def check_output(path: Path) -> None:
    """Checks, before the work, that a file can be written.

    Args:
        path: The file to make or replace.

    Raises:
        UsageError: If it is a folder, or its folder does not exist or is not writable.
    """
    try:  # permissions are not enough: root has all, and some file systems are read-only
        if path.is_dir():
            raise UsageError(f"a file to write is needed; {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(
                f"the file to write needs a folder that exists; got {path}; make the folder "
                f"{path.parent}"
            )
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".featup-hub-"):
            pass
    except OSError as error:
        raise UsageError(
            f"the file to write needs a folder that takes new files; got {path} "
            f"({error.strerror}); name another"
        ) from error


def make_folder(out: Path) -> None:
    """Makes the folder of outputs.

    Raises:
        UsageError: If it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must be a folder; {explain(error)}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UsageError(f"--out must be a folder that can be written to; {out} cannot")


def is_finished(job: Job, settings: Mapping[str, str]) -> bool:
    """Returns whether the outputs exist.

    Only safetensors files store their settings; an existing npy file counts as finished.

    Args:
        job: The outputs.
        settings: Settings of the features, as :func:`write_features` stores them.

    Raises:
        FileNotFoundError: If neither output nor image exists.
        ValueError: If the outputs have other settings, or are other files.
    """
    remedy = "--overwrite replaces it, another --out keeps both"
    if job.features.exists():
        notes = settings if job.features.suffix == ".npy" else _notes(job.features, remedy)
        for key, wanted in settings.items():
            if (found := notes.get(key, _FORMERLY.get(key, "unknown"))) != wanted:
                raise ValueError(
                    f"{job.features} exists, made with {key} {found}, not {wanted}; {remedy}"
                )
        return job.picture is None or job.picture.exists()
    if job.picture is not None and job.picture.exists():
        features = (job.features.with_suffix(f".{suffix}") for suffix in FORMATS)
        if not any(file.exists() for file in features):
            raise ValueError(
                f"{job.picture} exists without features, so it is not of an earlier run; {remedy}"
            )
    if not job.image.exists():
        raise FileNotFoundError(f"no such file: {job.image}")
    return False


def _notes(features: Path, remedy: str) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(features, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{features} is not a safetensors file; {remedy}") from error


def write_features(features: Tensor, job: Job, settings: Mapping[str, str]) -> None:
    """Writes features atomically, in the format of the file's suffix.

    Args:
        features: (C, H, W), on any device.
        job: The output files.
        settings: Settings to store in a safetensors file; "dtype" is the type of the file.

    Raises:
        OSError: If the file cannot be written, such as to a full disk.
        ValueError: If a value exceeds the type's range.
    """
    import torch

    from featup_hub.files import write_atomically

    whole = features.to("cpu", getattr(torch, settings["dtype"])).contiguous()
    if whole.dtype == torch.float16 and whole.isinf().any() and not features.isinf().any():
        raise ValueError(
            f"float16 holds values up to 65504; features reach {features.abs().max():.6g}; leave "
            "--dtype out"
        )
    with write_atomically(job.features) as partial:
        if job.features.suffix == ".npy":
            import numpy as np

            with partial.open("wb") as file:
                np.save(file, whole.numpy())
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = os.fsencode(job.image.name).decode(errors="replace")
        partial.touch()
        usual = partial.stat().st_mode
        try:
            notes = {**settings, "image": name, "featup_hub": __version__}
            save_file({"features": whole}, partial, metadata=notes)
        except SafetensorError as error:  # the library's error for a full disk, too
            raise OSError(f"cannot write {job.features}: {error}") from error
        partial.chmod(usual)  # the library makes files that other users cannot read
