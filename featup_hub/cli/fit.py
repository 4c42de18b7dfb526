"""Fit the features of one image.

Finds the features that explain the backbone's features of many views of the image.
FittedFeatures.load(OUT).features((H, W)) in Python gives them at any size. A picture beside OUT
compares them with the backbone's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.arguments import UsageError, check_output, choose_backbone, usage_errors
from featup_hub.cli.flags import add_backbone, add_flags, from_flags, in_terms_of_flags
from featup_hub.training.config import BASIS, PRESETS, FitConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the image")
    add_backbone(parser)
    add("--size", type=int, default=224, help="short side in pixels (default: %(default)s)")
    add("--out", type=Path, help="file to write (default: IMAGE's name in this folder)")
    add(
        "--preset",
        choices=list(PRESETS),
        default="fast",
        help="fast: exact least squares; upstream: FeatUp's network, for a GPU. The options below "
        "override the preset; the defaults shown are those of fast",
    )
    add(
        "--upsampler",
        metavar="NAME|FILE",
        help="JBU stages that least squares use: a shipped upsampler, jbu_denoise or jbu_faithful, "
        "or a file (default: %(default)s)",
        default=BASIS,
    )
    add("--no-picture", action="store_true", help="make no picture")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    add("--device", default="cpu", help="where to compute (default: %(default)s)")
    add_flags(parser, FitConfig)


def run(args: argparse.Namespace) -> int:
    import torch

    from featup_hub.files import write_atomically
    from featup_hub.image import normalise, resize
    from featup_hub.loading import load_backbone, load_upsampler, nearest_multiple, open_device
    from featup_hub.pixels import read_image
    from featup_hub.training.fit import fit
    from featup_hub.visualize import comparison

    # Checked before the slow fit.
    if args.size < 1:
        raise UsageError(f"--size must be positive; got {args.size}")
    with in_terms_of_flags(FitConfig):
        config = from_flags(FitConfig, args, PRESETS[args.preset])
    card, file = choose_backbone(args.model, args.upsampler)
    out, picture = _outputs(args, file)
    with usage_errors():
        device = open_device(args.device)
    photo = read_image(args.image)
    upsampler = load_upsampler(args.upsampler, device=device)
    backbone = load_backbone(card, weights=file).to(device)
    patch = backbone.patch_size
    shown = resize(photo, nearest_multiple(args.size, patch), multiple_of=patch)
    image = normalise(shown, mean=backbone.mean, std=backbone.std).to(device)
    fitted = fit(image, backbone, config, upsampler=upsampler, progress=True)
    fitted.save(out)
    if picture is not None:
        with torch.no_grad():
            drawn = comparison(shown, backbone(image).float(), fitted.features())
        with write_atomically(picture) as partial:
            drawn.save(partial, format="PNG")
    print(f"wrote {out}: " + ", ".join(f"{k} {v:.4g}" for k, v in fitted.scores.items()))
    return 0


def _outputs(args: argparse.Namespace, own_weights: Path | None) -> tuple[Path, Path | None]:
    """Returns the files of the fit and the picture; refuses to replace inputs and other files."""
    out = args.out or Path(f"{args.image.stem}.safetensors")
    check_output(out, ".safetensors")
    picture = None if args.no_picture else out.with_suffix(".png")
    if picture is not None:
        check_output(picture)
    inputs = [Path(name).expanduser() for name in (args.image, args.upsampler, own_weights) if name]
    for file in filter(Path.exists, filter(None, (out, picture))):
        advice = "another --out" + (", or --no-picture" if file == picture else "")
        for source in filter(Path.exists, inputs):
            if file.samefile(source):
                raise UsageError(
                    f"writing {file} would replace {source}, which is read; give {advice}"
                )
        if not args.overwrite:
            raise UsageError(f"{file} exists; give --overwrite to replace it, or {advice}")
    return out, picture
