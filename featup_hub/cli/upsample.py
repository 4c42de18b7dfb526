"""Compute high-resolution features of images.

For each IMAGE, OUT gets a file of features, (C, H, W), and a picture. It shows the image, the
backbone's features, and the features upsampled bilinearly and by the model, all in one PCA basis.
`featup-hub models` lists the models. Finished outputs are kept, so the same command resumes after
an interruption. A bad image is reported and skipped; the exit code is then 1. Files of --format npy
do not store settings, so existing ones are always kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featup_hub.cli.arguments import (
    UsageError,
    add_model,
    choose_model,
    complain,
    explain,
    make_folder,
    open_device,
    parse_size,
    usage_errors,
)
from featup_hub.cli.outputs import FORMATS, Job, is_finished, plan, write_outputs

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from featup_hub.registry import ModelCard

_IMPLEMENTATIONS = ("auto", "cuda", "torch", "reference")
_AHEAD = 2  # images read ahead
Picture = TypeVar("Picture")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="an image, or a folder of images")
    add_model(parser)
    add(
        "--size",
        type=parse_size,
        help="short side in pixels, such as 448, or HxW, such as 448x640, which crops to that "
        "shape; a multiple of the model's stride (default: short side as the model's card says)",
    )
    add(
        "--bands",
        type=_bands,
        metavar="R,G,B",
        help="numbers of the red, green and blue bands, from 1, such as 4,3,2",
    )
    add(
        "--value-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="the pixel values that are black and white, such as 0 4095 for 12 bits",
    )
    add("--out", type=Path, default=Path("features"), help="folder (default: %(default)s)")
    add(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="of the features: safetensors, which notes model and size, or npy "
        "(default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the features; float16 halves the files (default: %(default)s)",
    )
    add("--no-picture", action="store_true", help="make no picture")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add(
        "--impl",
        choices=_IMPLEMENTATIONS,
        default="auto",
        help="how to compute the upsampling (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from featup_hub.image import check_size, normalise, read_image, resize
    from featup_hub.loading import load, stride_and_size

    card, options = choose_model(args)
    with usage_errors():
        stride, size = stride_and_size(card, layer=args.layer, looks=args.looks)
    size = size if args.size is None else args.size
    with usage_errors("--", f"; {stride} is the stride of {card.name}"):
        check_size(size, multiple_of=stride)
    device = open_device(args.device)
    if args.impl == "cuda" and device.type != "cuda":
        raise UsageError(f"--impl cuda needs a CUDA device; got {device}; leave --impl out")
    jobs = plan(args.images, args.out, args.format, picture=not args.no_picture)
    make_folder(args.out)
    settings = _settings(args, card, options, size)
    progress = _Progress(len(jobs))
    todo = jobs if args.overwrite else _unfinished(jobs, settings, progress)
    if todo:
        model = load(card, **options, device=device)

        def read(job: Job) -> tuple[Image.Image, Tensor]:
            photo = read_image(job.image, bands=args.bands, value_range=args.value_range)
            shown = resize(photo, size, multiple_of=stride)
            return shown, normalise(shown, mean=model.mean, std=model.std)

        for job, reading in _read_ahead(todo, read):
            start = progress.begin(str(job.image))
            try:
                shown, image = reading.result()
                image = image.to(device)
                with torch.inference_mode():
                    source = model.source(image)
                    features = model.upsampler(source, image, impl=args.impl)
                    made = write_outputs(job, shown, source, features, settings)
                shape = " x ".join(map(str, features.shape[1:]))
                took = time.monotonic() - start
                progress.end("written", f"wrote {made}: {shape} in {took:.1f} s")
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                if args.debug:
                    raise
                reason = explain(error)
                known = str(job.image) in reason
                progress.end("failed", reason if known else f"{job.image}: {reason}")
    progress.finish(args.out)
    return 1 if progress.counts["failed"] else 0


def _settings(
    args: argparse.Namespace,
    card: ModelCard,
    options: Mapping[str, Any],
    size: int | tuple[int, int],
) -> dict[str, str]:
    """Returns the settings of the features, which their file stores."""
    from featup_hub.files import sha256_of_file

    own = options["backbone_weights"]
    return {
        "model": card.name,
        "normalised": "no" if args.no_norm else "yes",
        "upsampler": sha256_of_file(options["upsampler"])[:16],
        "backbone": sha256_of_file(own)[:16] if own else "its own",
        "layer": "default" if args.layer is None else str(args.layer),
        "looks": str(args.looks),
        "size": "x".join(map(str, size)) if isinstance(size, tuple) else str(size),
        "dtype": args.dtype,
        "bands": ",".join(map(str, args.bands or ["all"])),
        "value_range": " ".join(map(str, args.value_range or ["full"])),
    }


class _Progress:
    """Counts images and shows progress: a bar on a terminal, else a line per image."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.counts = {"written": 0, "kept": 0, "failed": 0}
        self.total, self.start = total, time.monotonic()
        self.live = total > 1 and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="image", disable=not self.live, leave=False)

    def begin(self, item: str) -> float:
        """Shows the image about to be worked on, on a terminal; returns the time."""
        self.bar.set_description(item)
        return time.monotonic()

    def end(self, outcome: str, report: str, count: int = 1) -> None:
        """Counts images and reports on them; of a written one, the bar is the report."""
        self.counts[outcome] += count
        self.bar.update(count)
        with self.bar.external_write_mode():
            if outcome == "failed":
                complain(report)
            elif outcome == "kept":
                print(report, flush=True)
            elif not self.live:
                number = f"[{sum(self.counts.values())}/{self.total}] " if self.total > 1 else ""
                print(f"{number}{report}", flush=True)

    def finish(self, out: Path) -> None:
        """Prints the counts if there was more than one image."""
        self.bar.close()
        if self.total > 1:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
            minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
            print(f"{counts} in {out}, {minutes}:{seconds:02} min", flush=True)


def _unfinished(jobs: Sequence[Job], settings: Mapping[str, str], progress: _Progress) -> list[Job]:
    """Returns the unfinished jobs, and reports the others."""
    kept: list[Job] = []
    todo: list[Job] = []
    for job in jobs:
        try:
            (kept if is_finished(job, settings) else todo).append(job)
        except (OSError, ValueError) as error:
            progress.end("failed", explain(error))
    if kept:
        what = str(kept[0].features) if len(kept) == 1 else f"{len(kept)} finished outputs"
        progress.end("kept", f"kept {what}; --overwrite replaces", len(kept))
    return todo


def _read_ahead(
    jobs: Sequence[Job], read: Callable[[Job], Picture]
) -> Iterator[tuple[Job, Future[Picture]]]:
    """Yields the jobs in order while another thread reads a few images ahead."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    waiting: deque[tuple[Job, Future[Picture]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(read, job)))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        yield from waiting
    finally:  # after an interruption, wait only for the image being read
        pool.shutdown(cancel_futures=True)


def _bands(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(
            f"bands are three numbers from 1, such as 4,3,2; got {text!r}"
        )
    return tuple(int(number) for number in numbers)
