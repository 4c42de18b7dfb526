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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from featup_hub.cli.arguments import UsageError, choose_model, complain, explain, make_folder
from featup_hub.cli.flags import add_model, parse_size
from featup_hub.cli.outputs import FORMATS, plan, settings_of, unfinished, write_outputs

_IMPLEMENTATIONS = ("auto", "cuda", "torch", "reference")


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
    from tqdm import tqdm

    from featup_hub.image import normalise, resize
    from featup_hub.loading import load
    from featup_hub.pixels import read_image
    from featup_hub.visualize import comparison

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_model(args, size=args.size, device=device)
    place = chosen.options["device"]
    if args.impl == "cuda" and place.type != "cuda":
        raise UsageError(f"--impl cuda needs a CUDA device; got {place}; leave --impl out")
    jobs = plan(args.images, args.out, args.format, picture=not args.no_picture)
    settings = settings_of(args, chosen)
    todo, kept, problems = (jobs, [], []) if args.overwrite else unfinished(jobs, settings)
    for problem in problems:
        complain(problem)
    if kept:
        what = str(kept[0].features) if len(kept) == 1 else f"{len(kept)} finished outputs"
        print(f"kept {what}; --overwrite replaces", flush=True)
    written, failed, total, start = 0, len(problems), len(jobs), time.monotonic()
    if todo:
        make_folder(args.out)  # only now, so that a mistyped name leaves no folder
        model = load(chosen.card, **chosen.options)
    read = partial(read_image, bands=args.bands, value_range=args.value_range)
    live = total > 1 and sys.stderr.isatty()
    bar = tqdm(
        todo, initial=total - len(todo), total=total, unit="image", disable=not live, leave=False
    )
    with ThreadPoolExecutor(max_workers=1) as ahead:  # reads the next image
        coming = [ahead.submit(read, job.image) for job in todo[:1]]
        for index, job in enumerate(bar):
            bar.set_description(str(job.image))
            coming += [ahead.submit(read, after.image) for after in todo[index + 1 : index + 2]]
            began = time.monotonic()
            try:
                shown = resize(coming.pop(0).result(), chosen.size, multiple_of=chosen.stride)
                image = normalise(shown, mean=model.mean, std=model.std).to(place)
                with torch.inference_mode():
                    source = model.source(image)
                    features = model.upsampler(source, image, impl=args.impl)
                picture = comparison(shown, source, features) if job.picture else None
                made = write_outputs(job, features, picture, settings)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                if args.debug:
                    raise
                failed += 1
                reason = explain(error)
                with bar.external_write_mode():
                    complain(reason if str(job.image) in reason else f"{job.image}: {reason}")
                continue
            written += 1
            if not live:  # of a written image, the bar is the report
                number = f"[{written + len(kept) + failed}/{total}] " if total > 1 else ""
                shape = " x ".join(map(str, features.shape[1:]))
                took = time.monotonic() - began
                print(f"{number}wrote {made}: {shape} in {took:.1f} s", flush=True)
    if total > 1:
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        counts = f"{written} written, {len(kept)} kept, {failed} failed"
        print(f"{counts} in {args.out}, {minutes}:{seconds:02} min", flush=True)
    return 1 if failed else 0


def _bands(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(
            f"bands are three numbers from 1, such as 4,3,2; got {text!r}"
        )
    return tuple(int(number) for number in numbers)
