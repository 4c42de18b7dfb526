r"""How well does an implicit upsampler explain views it never saw, against JBU and interpolation?

For every photograph: an implicit fit; then each upsampler's map at the image's size goes through
new jitters and is reduced to the backbone's grid by one blur kernel of 4×4 taps, fitted by least
squares for each upsampler on views of their own, so that none is favoured by a downsampler. The
error is the share of the variation of further views that is left, along random directions of the
backbone's own features (not of their principal components).

    python -m benchmarks.implicit PHOTO... --jbu weights/jbu_universal.safetensors --out FILE.json
    python -m benchmarks.implicit PHOTO... --model TIMM_NAME=FILE --options steps=300 seed=1
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub import load_upsampler
from featup_hub.backbones import Backbone
from featup_hub.image import preprocess, read_image
from featup_hub.training.images import seeded
from featup_hub.training.implicit import PRESETS, fit
from featup_hub.training.projection import random_projection
from featup_hub.training.sources import open_backbones
from featup_hub.training.views import apply_jitter, sample_jitter
from featup_hub.visualize import comparison

TAPS = 4
SIDE = 224


def main() -> None:
    """Measures photographs one by one; prints and keeps every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--jbu", type=Path, help="weights of stages to compare with")
    parser.add_argument("--warm", action="store_true", help="fit from these stages, too")
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--views", type=int, default=12, help="per photograph, to measure on")
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = dict(_option(text) for text in args.options)
    backbone = open_backbones([args.model])[args.model]
    rows: list[dict[str, Any]] = []
    for photo in args.photos:
        rows.append({"photo": photo.name, **_photo(photo, backbone, options, args)})
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"arguments": vars(args), "rows": rows}, default=str))
    print(json.dumps(summary(rows)))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns mean errors, and by how much the implicit ones are below the others."""
    names = list(rows[0]["errors"])
    means = {name: sum(row["errors"][name] for row in rows) / len(rows) for name in names}
    below = {
        f"{ours} below {other}": 1 - means[ours] / means[other]
        for ours in names
        if "implicit" in ours
        for other in names
        if "implicit" not in other
    }
    return {"photos": len(rows), **means, **below}


def _photo(
    photo: Path, backbone: Backbone, options: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Measures one photograph."""
    shown = read_image(photo)
    image = preprocess(shown, (SIDE, SIDE), mean=backbone.mean, std=backbone.std)
    stack = None if args.jbu is None else load_upsampler(weights=args.jbu)
    with torch.inference_mode():
        source = backbone(image)
        maps = {
            name: F.interpolate(source, (SIDE, SIDE), mode=name) for name in ("bilinear", "bicubic")
        }
        if stack is not None:
            maps["jbu"] = stack(source, image)
    spent: dict[str, dict[str, float]] = {}
    starts = {"implicit": None, **({"implicit from jbu": stack} if args.warm else {})}
    for name, start in starts.items():
        wall, cpu = time.monotonic(), time.process_time()
        upsampler = fit(
            image, backbone, PRESETS[args.preset], start=start, progress=True, **options
        )
        spent[name] = {
            "wall_s": round(time.monotonic() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **upsampler.scores,
        }
        maps[name] = upsampler.features()
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            resized = shown.resize((SIDE, SIDE))
            picture = comparison(resized, source.clone(), maps[name])
            picture.save(args.pictures / f"{photo.stem} {name}.png")
    return {"errors": errors(image, backbone, maps, args.views), "fits": spent}


@torch.inference_mode()
def errors(
    image: Tensor, backbone: Backbone, maps: Mapping[str, Tensor], count: int, directions: int = 32
) -> dict[str, float]:
    """Returns the share of the variation of new views that each map leaves unexplained."""
    generator = seeded(0, 99)
    projection = random_projection(backbone.feat_dim, directions, generator)
    jitters = [
        sample_jitter((SIDE, SIDE), max_pad=30, max_zoom=1.8, generator=generator)
        for _ in range(2 * count)
    ]
    seen = torch.cat([backbone(apply_jitter(image, [jitter])) for jitter in jitters])
    seen = torch.einsum("kc,bchw->bkhw", projection, seen)
    mean = seen.mean((0, 2, 3))[:, None, None]
    targets = (seen - mean).flatten(1)  # (V, K·h·w)
    found = {}
    for name, features in maps.items():
        projected = torch.einsum("kc,bchw->bkhw", projection, features) - mean
        inputs = torch.stack([cells(projected, j, seen.shape[-2:]) for j in jitters])
        fitted, new = inputs[:count].flatten(0, 1), inputs[count:].flatten(0, 1)
        gram, moment = fitted.t() @ fitted, fitted.t() @ targets[:count].flatten()
        gram.diagonal().add_(1e-4 * gram.diagonal().mean())
        kernel = torch.linalg.solve(gram.double(), moment.double()).float()
        left = (new @ kernel - targets[count:].flatten()).square().sum()
        found[name] = round(float(left / targets[count:].square().sum()), 4)
    return found


def cells(features: Tensor, jitter: Any, size: tuple[int, int]) -> Tensor:
    """Returns the taps of every cell of a view, (K·h·w, TAPS²)."""
    view = F.adaptive_avg_pool2d(apply_jitter(features, [jitter]), [n * TAPS for n in size])
    windows = F.unfold(view[0][:, None], TAPS, stride=TAPS)  # (K, TAPS², h·w)
    return windows.transpose(1, 2).flatten(0, 1)


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
