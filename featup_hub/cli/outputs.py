"""The outputs of ``upsample``: planned, found finished, written.

A file under its final name is complete, so a stopped run resumes with the missing files. A picture
is written after its features, so a picture without features is not an output.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from featup_hub import __version__
from featup_hub.cli.arguments import Choice, UsageError, explain

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

FORMATS = ("safetensors", "npy")
"""Formats of features, by the suffix of the file."""
_DIGEST = "image_sha256"


class Job(NamedTuple):
    """An image, the file of features to make, and the picture beside it, if any."""

    image: Path
    features: Path
    picture: Path | None


def plan(inputs: list[Path], out: Path, suffix: str, *, picture: bool) -> list[Job]:
    """Lists the images and their output files.

    An image in a folder keeps its path relative to that folder.
    """
    jobs: dict[Path, Job] = {}
    for top in inputs:
        if picture and top.is_dir() and top.resolve() == out.resolve():
            raise UsageError(
                f"pictures in {top} would be taken for images in the next run; "
                "choose another --out, or --no-picture"
            )
        for image in _images(top, out):
            place = out / (image.name if image == top else image.relative_to(top))
            drawn = place.with_suffix(".png") if picture else None
            job = Job(image, place.with_suffix(f".{suffix}"), drawn)
            other = jobs.setdefault(job.features, job).image
            if other.resolve() != image.resolve():
                raise UsageError(
                    f"every image needs an output of its own; {other} and {image} would both be "
                    f"{job.features}; rename one, or give each an --out of its own"
                )
            if drawn is not None and drawn.resolve() == image.resolve():
                raise UsageError(
                    f"the picture {drawn} would replace the image; choose another --out"
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


def settings_of(args: argparse.Namespace, chosen: Choice) -> dict[str, str]:
    """Returns the settings of the features, which their file stores."""
    from featup_hub.files import sha256_of_file
    from featup_hub.registry import UPSAMPLERS
    from featup_hub.weights import resolve

    shipped, own = UPSAMPLERS.get(args.upsampler), chosen.options["backbone_weights"]
    upsampler = shipped.sha256 if shipped else sha256_of_file(resolve(args.upsampler))
    size = chosen.size
    return {
        "model": chosen.card.name,
        "normalised": "no" if args.no_norm else "yes",
        "upsampler": upsampler[:16],
        "backbone": sha256_of_file(own)[:16] if own else "its own",
        "layer": "default" if args.layer is None else str(args.layer),
        "looks": f"{args.looks} (every second one mirrored)" if args.looks > 1 else "1",
        "size": "x".join(map(str, size)) if isinstance(size, tuple) else str(size),
        "dtype": args.dtype,
        "bands": ",".join(map(str, args.bands or ["all"])),
        "value_range": " ".join(map(str, args.value_range or ["full"])),
    }


def unfinished(
    jobs: Sequence[Job], settings: Mapping[str, str]
) -> tuple[list[Job], list[Job], list[str]]:
    """Returns the jobs to do, those that are finished, and the problems of the others."""
    todo: list[Job] = []
    kept: list[Job] = []
    problems: list[str] = []
    for job in jobs:
        try:
            (kept if _is_finished(job, settings) else todo).append(job)
        except (OSError, ValueError) as error:
            problems.append(explain(error))
    return todo, kept, problems


def _is_finished(job: Job, settings: Mapping[str, str]) -> bool:
    """Returns whether the outputs exist.

    Only safetensors files store their settings; an existing npy file counts as finished. Outputs of
    other settings or of another image, and other files under their names, are errors.
    """
    from featup_hub.files import sha256_of_file
    from featup_hub.weights.files import metadata

    remedy = "--overwrite replaces it, another --out keeps both"
    if job.features.exists():
        try:
            notes = settings if job.features.suffix == ".npy" else metadata(job.features)
        except ValueError as error:
            raise ValueError(f"{job.features} is not a safetensors file; {remedy}") from error
        for key, wanted in settings.items():
            if (found := notes.get(key, "unknown")) != wanted:
                raise ValueError(
                    f"{job.features} exists, made with {key} {found}, not {wanted}; {remedy}"
                )
        of = notes.get(_DIGEST)
        if of is not None and job.image.exists() and of != sha256_of_file(job.image):
            raise ValueError(f"{job.features} exists, made of another {job.image.name}; {remedy}")
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


def write_outputs(
    job: Job, features: Tensor, picture: Image.Image | None, settings: Mapping[str, str]
) -> str:
    """Writes the features, (1, C, H, W), then the picture; returns what was written."""
    from featup_hub.files import write_atomically

    _write_features(features[0], job, settings)
    if job.picture is None or picture is None:
        return str(job.features)
    # Written last: a picture without features is then known not to be an output.
    with write_atomically(job.picture) as partial:
        picture.save(partial, format="PNG")
    return f"{job.features} and {job.picture.name}"


def _write_features(features: Tensor, job: Job, settings: Mapping[str, str]) -> None:
    """Writes features, (C, H, W), in the format of the file's suffix.

    A safetensors file stores the settings; "dtype" among them is the type of the file.
    """
    import torch

    from featup_hub.files import sha256_of_file, write_atomically
    from featup_hub.weights.files import write

    whole = features.to("cpu", getattr(torch, settings["dtype"]))
    if whole.dtype == torch.float16 and whole.isinf().any() and not features.isinf().any():
        raise ValueError(
            f"float16 holds values up to 65504; features reach {features.abs().max():.6g}; leave "
            "--dtype out"
        )
    job.features.parent.mkdir(parents=True, exist_ok=True)
    if job.features.suffix == ".npy":
        import numpy as np

        with write_atomically(job.features) as partial, partial.open("wb") as file:
            np.save(file, whole.numpy())
        return
    name = os.fsencode(job.image.name).decode(errors="replace")
    notes = {**settings, "image": name, "featup_hub": __version__}
    notes[_DIGEST] = sha256_of_file(job.image)
    write({"features": whole}, job.features, metadata=notes)
