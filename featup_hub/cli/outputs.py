"""What commands write, checked before the work; ``upsample``: features and a picture per image.

A file under its final name is complete, so a run that was stopped goes on with what is missing.
A picture is written after its features: one that has none beside it is somebody else's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from featup_hub import __version__
from featup_hub.cli.terminal import UsageError, explain
from featup_hub.files import write_atomically
from featup_hub.image import IMAGE_SUFFIXES, list_images

__all__ = ["FORMATS", "Job", "check_output", "is_finished", "make_folder", "plan", "write_features"]

FORMATS = ("safetensors", "npy")
"""Of features, by the suffix of their file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to work on.

    Attributes:
        image: The file to read.
        features: The file to make.
        picture: The picture to make beside it; None where none is wanted.
    """

    image: Path
    features: Path
    picture: Path | None


def plan(inputs: list[Path], out: Path, suffix: str, *, picture: bool) -> list[Job]:
    """Lists the images and where their outputs go.

    An image of a folder keeps its place below that folder.

    Args:
        inputs: Images, and folders to search with their subfolders.
        out: Folder of the outputs; images in it are left out of the search.
        suffix: Format of the features, one of ``FORMATS``.
        picture: Whether to plan pictures.

    Raises:
        UsageError: If a folder holds no image, or two files would have one name.
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


def _images(path: Path, out: Path) -> Iterator[Path]:
    """Yields a file, or the images of a folder and its subfolders in order of their names."""
    if not path.is_dir():
        yield path
        return
    found = list_images(path)
    if path.resolve() in out.resolve().parents:  # pictures of an earlier run are no images
        found = [file for file in found if out.resolve() not in file.resolve().parents]
    if not found:
        raise UsageError(
            f"a folder of images ({' '.join(sorted(IMAGE_SUFFIXES))}) is needed; {path} holds none"
        )
    yield from found


def check_output(path: Path) -> None:
    """Refuses a file that could not be written, before the work is done for it.

    Args:
        path: The file to make or replace.

    Raises:
        UsageError: If it is a folder, or its folder does not exist or takes no new files.
    """
    if path.is_dir():
        raise UsageError(f"a file to write is needed; {path} is a folder; name a file in it")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(
            f"the file to write needs a folder that exists; got {path}; make the folder {folder}"
        )
    try:  # permissions do not tell: root has all, and some file systems take no files at all
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".partial"):
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


def is_finished(job: Job, record: Mapping[str, str]) -> bool:
    """Tells whether the outputs exist.

    Only safetensors files note how they were made; a npy file that exists is taken as it is.

    Args:
        job: What is to be made.
        record: What decides the features, as noted in the file.

    Raises:
        ValueError: If they were made with other settings, or are something else.
    """
    remedy = "--overwrite replaces it, another --out keeps both"
    if not job.features.exists():
        features = (job.features.with_suffix(f".{suffix}") for suffix in FORMATS)
        if job.picture and job.picture.exists() and not any(file.exists() for file in features):
            raise ValueError(
                f"{job.picture} exists, and no features beside it, so it is not of an earlier "
                f"run; {remedy}"
            )
        return False
    if job.features.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(job.features, framework="pt") as file:
                notes = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{job.features} is not a safetensors file; {remedy}") from error
        for key, wanted in record.items():
            if notes.get(key) != wanted:
                raise ValueError(
                    f"{job.features} exists, made with {key} {notes.get(key, 'unknown')} "
                    f"in place of {wanted}; {remedy}"
                )
    return job.picture is None or job.picture.exists()


def write_features(features: Tensor, job: Job, record: Mapping[str, str]) -> None:
    """Writes features in the format that the file's name asks for, all or nothing.

    Args:
        features: (C, H, W), float32, contiguous, on the CPU.
        job: Where to.
        record: What decides the features, noted in a safetensors file.
    """
    with write_atomically(job.features) as partial:
        if job.features.suffix == ".npy":
            import numpy as np

            with partial.open("wb") as file:
                np.save(file, features.numpy())
        else:
            from safetensors.torch import save_file

            notes = {**record, "image": job.image.name, "featup_hub": __version__}
            partial.touch()
            usual = partial.stat().st_mode
            save_file({"features": features}, partial, metadata=notes)
            partial.chmod(usual)  # the library makes files that nobody else may read
