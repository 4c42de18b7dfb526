"""``featup-hub upsample``: images in, features at their resolution out, and pictures of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from featup_hub.cli.ahead import ahead
from featup_hub.cli.devices import open_device
from featup_hub.cli.outputs import FORMATS, Job, is_finished, make_folder, plan, write_features
from featup_hub.cli.terminal import Progress, UsageError, explain
from featup_hub.files import write_atomically
from featup_hub.image import check_size, preprocess, read_image, resize
from featup_hub.model import UpsampledBackbone, find_card, load
from featup_hub.ops import Implementation
from featup_hub.registry import ModelCard
from featup_hub.visualize import comparison
from featup_hub.weights import digest, resolve
from featup_hub.weights.files import existing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["add_parser"]

_AHEAD = 2  # images read while one is computed

_IN_FLAGS = {  # what errors advise in Python, as it is typed here
    "got use_norm=False; leave it at True": "leave --no-norm out",
    "got use_norm=True; pass use_norm=False": "give --no-norm",
    "give its path as weights": "give its path as --backbone-weights",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "upsample",
        help="compute high-resolution features of images",
        description=(
            "Computes features at the resolution of the image. For each IMAGE, OUT holds a file "
            "of features, (C, H, W) in float32, and a picture that shows the image, the "
            "backbone's features, and these upsampled bilinearly and by the model, all in one "
            "PCA basis. `featup-hub models` lists the models."
        ),
        epilog=(
            "Finished outputs are kept, so the same command again goes on after an interruption. "
            "A bad image is reported and the others go on; the exit code is then 1. Files of "
            "--format npy note no settings: those of others count as finished, too."
        ),
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="an image, or a folder of images")
    add("--model", default="efficientnet_lite0", help="its name (default: %(default)s)")
    add("--weights", type=Path, metavar="FILE", help="an upsampler of your own, or jbu_faithful")
    add("--backbone-weights", type=Path, metavar="FILE", help="weights of your own, as timm's")
    add("--no-norm", action="store_true", help="do not normalise features before upsampling")
    add(
        "--size",
        help="short side in pixels, such as 448, or HxW, such as 448x640, which crops to that "
        "shape; a multiple of the model's stride (default: short side as the model's card says)",
    )
    add("--out", type=Path, default=Path("features"), help="folder (default: %(default)s)")
    add(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="of the features: safetensors, which notes model and size, or npy "
        "(default: %(default)s)",
    )
    add("--no-picture", action="store_true", help="make no picture")
    add("--overwrite", action="store_true", help="make outputs anew that exist")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    add(
        "--impl",
        choices=get_args(Implementation),
        default="auto",
        help="who computes the upsampling (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    card = _card(args.model)
    size = _size(args.size, card)
    device = open_device(args.device)
    if args.impl == "cuda" and device.type != "cuda":
        raise UsageError(f"--impl cuda needs a CUDA device; got {device}; leave --impl out")
    jobs = plan(args.images, args.out, args.format, picture=not args.no_picture)
    make_folder(args.out)
    record = _record(args, card, size)

    progress = Progress(len(jobs))
    todo: list[Job] = []
    kept: list[Job] = []
    for job in jobs:
        try:
            if not args.overwrite and is_finished(job, record):
                kept.append(job)
            elif job.image.exists():
                todo.append(job)
            else:
                progress.fail(f"no such file: {job.image}")
        except (OSError, ValueError) as error:
            progress.fail(explain(error))
    if kept:
        what = str(kept[0].features) if len(kept) == 1 else f"{len(kept)} finished outputs"
        progress.skip(len(kept), f"kept {what}; --overwrite makes anew")
    if todo:
        model = _load(args, device)
        stride = model.patch_size
        _check(size, stride, card.name)
    for job, shown in ahead(todo, lambda job: _read(job, size, stride), depth=_AHEAD):
        progress.begin(str(job.image))
        try:
            progress.end(_upsample(job, shown.result(), model, args.impl, record))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            if args.debug:
                raise
            reason = explain(error)
            name = "" if str(job.image) in reason else f"{job.image}: "
            progress.fail(f"{name}{reason}")
    progress.finish(f"in {args.out}")
    return 1 if progress.failed else 0


def _read(job: Job, size: int | tuple[int, int], stride: int) -> Image.Image:
    """Reads an image at the size wanted, which is all of it that is kept."""
    return resize(read_image(job.image), size, multiple_of=stride)


@torch.inference_mode()
def _upsample(
    job: Job,
    shown: Image.Image,
    model: UpsampledBackbone,
    impl: Implementation,
    record: Mapping[str, str],
) -> str:
    """Makes the outputs of one image and says what they are."""
    start = time.monotonic()
    image = preprocess(shown, mean=model.mean, std=model.std)
    image = image.to(next(model.parameters()).device)
    source = model.source(image)
    features = model.upsampler(source, image, impl=impl)
    job.features.parent.mkdir(parents=True, exist_ok=True)
    write_features(features[0].float().cpu().contiguous(), job, record)
    made = str(job.features)
    # Last, so that a picture without features is known to be somebody else's.
    if job.picture is not None:
        with write_atomically(job.picture) as partial:
            comparison(shown, source, features).save(partial, format="PNG")
        made = f"{made} and {job.picture.name}"
    shape = " x ".join(map(str, features.shape[1:]))
    return f"wrote {made}: {shape} in {time.monotonic() - start:.1f} s"


def _record(
    args: argparse.Namespace, card: ModelCard, size: int | tuple[int, int]
) -> dict[str, str]:
    """Returns what decides the features of an image, to be noted beside them."""
    try:
        upsampler = digest(resolve(card.upsampler_file, path=args.weights))
        own = digest(existing(args.backbone_weights)) if args.backbone_weights else ""
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(explain(error)) from error
    return {
        "model": card.name,
        "size": "x".join(map(str, size)) if isinstance(size, tuple) else str(size),
        "normalised": "no" if args.no_norm else "yes",
        "upsampler": upsampler[:16],
        "backbone": own[:16] or "its own",
    }


def _load(args: argparse.Namespace, device: torch.device) -> UpsampledBackbone:
    try:
        model = load(
            args.model,
            use_norm=not args.no_norm,
            weights=args.weights,
            backbone_weights=args.backbone_weights,
        )
    except (ValueError, RuntimeError) as error:
        text = str(error)
        for python, flags in _IN_FLAGS.items():
            text = text.replace(python, flags)
        raise type(error)(text) from error
    return model.to(device)


def _card(name: str) -> ModelCard:
    try:
        card = find_card(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if card.backbone is None:
        raise UsageError(
            f"a model with a backbone is needed; {name} upsamples features of your own, in Python"
        )
    return card


def _size(text: str | None, card: ModelCard) -> int | tuple[int, int]:
    """Reads ``--size``: 448 is the short side, 448x640 is height and width."""
    sides = (text or str(card.image_size)).lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise UsageError(f"--size must be a number, such as 448, or HxW, 448x640; got {text!r}")
    size = (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])
    _check(size, card.patch_size or 1, card.name)
    return size


def _check(size: int | tuple[int, int], stride: int, name: str) -> None:
    try:
        check_size(size, multiple_of=stride)
    except ValueError as error:
        raise UsageError(f"--{error}; {stride} is the stride of {name}") from error
