r"""Measures the fit of one image: error on views never fitted, time, memory, pictures.

For every photograph: a fit; then each method's map at the image's size is jittered as new views
are, and reduced to the backbone's grid by one blur kernel of 4×4 taps. The kernel is fitted by
least squares for each method on views of their own, so no downsampler favours a method. The error
is the share of the variation of further views that is left, along random directions of the
backbone's own features.

    python -m benchmarks.fit PHOTO... --network benchmarks/results/fit_network_lite0.json
    python -m benchmarks.fit PHOTO... --model NAME=FILE --out FILE.json

``--network`` names rows of the coordinate network, measured earlier by the same protocol. With
``--out`` each row is kept at once, and photographs that have one are not measured again.

:func:`lite0` is a plug-in for ``benchmarks.evaluate`` (``fit=benchmarks.fit:lite0``): it fits every
image of an evaluation and keeps the fits in a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featup_hub import FittedFeatures, load_backbone, load_upsampler
from featup_hub.backbones import Backbone
from featup_hub.files import write_atomically
from featup_hub.image import normalise, read_image, resize
from featup_hub.training.config import BASIS
from featup_hub.training.fit import fit
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import open_backbones, random_projection
from featup_hub.training.views import apply_jitter, sample_jitter
from featup_hub.visualize import contact_sheet, fit_pca, pca_rgb

TAPS = 4
KEPT = Path.home() / ".cache" / "featup_hub_fits"


def main() -> None:
    """Measures photographs one by one; prints and keeps every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--model", default="efficientnet_lite0", metavar="NAME[=FILE]")
    parser.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--upsampler", default=BASIS, metavar="NAME|FILE", help="basis of the fit")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of the fit")
    parser.add_argument("--views", type=int, default=12, help="per photograph, to measure on")
    parser.add_argument("--network", type=Path, help="JSON file of the network's rows")
    parser.add_argument("--sheet", type=Path, help="picture of all maps to write")
    parser.add_argument("--out", type=Path, help="JSON file of rows, to begin or to go on with")
    args = parser.parse_args()
    settings = {
        "model": args.model.partition("=")[0],
        "size": list(args.size),
        "upsampler": Path(args.upsampler).stem,
        "options": dict(_option(text) for text in args.options),
        "views": args.views,
        "threads": torch.get_num_threads(),
    }
    kept = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    if kept and kept["settings"] != settings:
        raise SystemExit(f"{args.out} has other settings, {kept['settings']}; name another file")
    rows = kept.get("rows", {})
    network = json.loads(args.network.read_text())["rows"] if args.network else {}
    backbone = open_backbones([args.model])[args.model].eval()
    panels: list[tuple[str, Image.Image]] = []
    for photo in args.photos:
        if photo.stem not in rows:
            row = _measure(photo, backbone, settings, args, panels)
            if photo.stem in network:
                row["errors"]["network"] = network[photo.stem]["errors"]["implicit"]
            rows[photo.stem] = row
            print(photo.stem, json.dumps(row), flush=True)
        if args.out:
            with write_atomically(args.out) as partial:
                partial.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    if args.sheet and panels:
        height, width = args.size
        columns = len(panels) // len(args.photos)
        contact_sheet(panels, size=(width, height), columns=columns).save(args.sheet)
    print(json.dumps(summary([row["errors"] for row in rows.values()]), indent=1))


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Returns mean errors, and by what share the fit's are below the others'.

    The intervals are of the mean share over photographs: 95 %, by a bootstrap.
    """
    found: dict[str, Any] = {
        "photos": len(rows),
        "mean errors": {n: round(sum(r[n] for r in rows) / len(rows), 4) for n in rows[0]},
    }
    for other in (name for name in rows[0] if name != "fit"):
        share = torch.tensor([1 - row["fit"] / row[other] for row in rows])
        drawn = torch.randint(len(rows), (10_000, len(rows)), generator=seeded(0))
        low, high = share[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
        found[f"below {other}"] = {
            "mean share": round(float(share.mean()), 4),
            "interval": [round(low, 4), round(high, 4)],
            "least share": round(float(share.min()), 4),
        }
    return found


def _measure(
    photo: Path,
    backbone: Backbone,
    settings: Mapping[str, Any],
    args: argparse.Namespace,
    panels: list[tuple[str, Image.Image]],
) -> dict[str, Any]:
    """Measures one photograph, and adds its pictures to ``panels``."""
    size = (args.size[0], args.size[1])
    shown = resize(read_image(photo), size)
    image = normalise(shown, mean=backbone.mean, std=backbone.std)
    stack = load_upsampler(args.upsampler)
    with torch.inference_mode():
        source = backbone(image)
        maps = {
            "bilinear": F.interpolate(source, size, mode="bilinear"),
            "jbu": stack(source, image),
        }
    wall, cpu = time.monotonic(), time.process_time()
    fitted = fit(image, backbone, upsampler=stack, **settings["options"])
    spent = {
        "wall_s": round(time.monotonic() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **{name: round(value, 4) for name, value in fitted.scores.items()},
    }
    maps["fit"] = fitted.features()
    if args.sheet:
        basis = fit_pca(source)
        panels.append(("image", shown))
        for name, features in {"source": source, **maps}.items():
            colours = pca_rgb(features, basis)[0].mul(255).byte().permute(1, 2, 0)
            panels.append((name, Image.fromarray(colours.numpy())))
    return {"errors": errors(image, backbone, maps, args.views), "fit": spent}


@torch.inference_mode()
def errors(
    image: Tensor, backbone: Backbone, maps: Mapping[str, Tensor], count: int, directions: int = 32
) -> dict[str, float]:
    """Returns the share of the variation of new views that each map does not explain."""
    generator = seeded(0, 99)
    projection = random_projection(backbone.feat_dim, directions, generator)
    jitters = [
        sample_jitter(
            (image.shape[-2], image.shape[-1]), max_pad=30, max_zoom=1.8, generator=generator
        )
        for _ in range(2 * count)
    ]
    seen = torch.cat([backbone(apply_jitter(image, [jitter])) for jitter in jitters])
    seen = torch.einsum("kc,bchw->bkhw", projection, seen)
    mean = seen.mean((0, 2, 3))[:, None, None]
    targets = (seen - mean).flatten(1)  # (V, K·h·w)
    found = {}
    for name, features in maps.items():
        projected = torch.einsum("kc,bchw->bkhw", projection, features) - mean
        inputs = torch.stack(
            [cells(projected, j, (seen.shape[-2], seen.shape[-1])) for j in jitters]
        )
        fitted, new = inputs[:count].flatten(0, 1), inputs[count:].flatten(0, 1)
        gram, moment = fitted.t() @ fitted, fitted.t() @ targets[:count].flatten()
        gram.diagonal().add_(1e-4 * gram.diagonal().mean())
        kernel = torch.linalg.solve(gram.double(), moment.double()).float()
        left = (new @ kernel - targets[count:].flatten()).square().sum()
        found[name] = round(float(left / targets[count:].square().sum()), 4)
    return found


def cells(features: Tensor, jitter: Any, size: tuple[int, int]) -> Tensor:
    """Returns the taps of every cell of a view, (K·h·w, TAPS²)."""
    taps = (size[0] * TAPS, size[1] * TAPS)
    view = F.adaptive_avg_pool2d(apply_jitter(features, [jitter]), taps)
    windows = F.unfold(view[0][:, None], TAPS, stride=TAPS)  # (K, TAPS², h·w)
    return windows.transpose(1, 2).flatten(0, 1)


def lite0(source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Fits EfficientNet-Lite0's features of images: (B, C, h, w) -> (B, C, *size).

    The fit asks the backbone itself and does not use ``source``.
    """
    with torch.inference_mode(False):
        return torch.cat([_fitted(one[None].clone()).features(size) for one in image])


def _fitted(image: Tensor) -> FittedFeatures:
    path = KEPT / f"{hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        return FittedFeatures.load(path)
    KEPT.mkdir(parents=True, exist_ok=True)
    found = fit(image, _backbone())
    found.save(path)
    return found


@cache
def _backbone() -> Backbone:
    return load_backbone("efficientnet_lite0")


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
