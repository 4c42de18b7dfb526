r"""How well does an implicit upsampler explain views it never saw, against JBU and interpolation?

For every photograph: an implicit fit; then each upsampler's map at the image's size goes through
new jitters and is reduced to the backbone's grid by one blur kernel of 4×4 taps, fitted by least
squares for each upsampler on views of their own, so that none is favoured by a downsampler. The
error is the share of the variation of further views that is left, along random directions of the
backbone's own features (not of their principal components).

    python -m benchmarks.implicit PHOTO... --jbu weights/jbu_universal.safetensors --out FILE.json
    python -m benchmarks.implicit PHOTO... --model TIMM_NAME=FILE --options steps=300 seed=1

With ``--out`` every row is kept at once, and photographs that have one are not measured again.
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
from PIL import Image
from torch import Tensor

from featup_hub import load_upsampler
from featup_hub.backbones import Backbone
from featup_hub.files import write_atomically
from featup_hub.image import preprocess, read_image, resize
from featup_hub.training.implicit import PRESETS, fit
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import open_backbones, random_projection
from featup_hub.training.views import apply_jitter, sample_jitter
from featup_hub.visualize import contact_sheet, fit_pca, pca_rgb

TAPS = 4
GOAL = 0.1  # by how much an error is to be below another one


def main() -> None:
    """Measures photographs one by one; prints and keeps every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--jbu", type=Path, help="weights of stages to compare with")
    parser.add_argument("--warm", action="store_true", help="fit from these stages, too")
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--views", type=int, default=12, help="per photograph, to measure on")
    parser.add_argument("--sheet", type=Path, help="picture of all maps to write")
    parser.add_argument("--out", type=Path, help="JSON file of rows, to begin or to go on with")
    args = parser.parse_args()
    settings = {
        "model": args.model.partition("=")[0],
        "size": list(args.size),
        "preset": args.preset,
        "options": dict(_option(text) for text in args.options),
        "views": args.views,
    }
    rows = _known(args.out, settings)
    backbone = open_backbones([args.model])[args.model]
    panels: list[tuple[str, Image.Image]] = []
    for photo in args.photos:
        if photo.stem in rows:
            continue
        rows[photo.stem] = _photo(photo, backbone, settings["options"], args, panels)
        print(photo.stem, json.dumps(rows[photo.stem]), flush=True)
        if args.out:
            with write_atomically(args.out) as partial:
                text = json.dumps({"settings": settings, "rows": rows}, indent=1)
                partial.write_text(text + "\n")
    if args.sheet and panels:
        height, width = args.size
        contact_sheet(panels, size=(width, height), columns=len(panels) // len(rows)).save(
            args.sheet
        )
    print(json.dumps(summary([row["errors"] for row in rows.values()]), indent=1))


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Returns mean errors, and by what share the implicit ones are below the others.

    The intervals are of the mean over photographs of each one's share: 95 %, by a bootstrap.
    """
    names = list(rows[0])
    means = {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in names}
    found: dict[str, Any] = {"photos": len(rows), "mean errors": means}
    for ours in (name for name in names if "implicit" in name):
        for other in (name for name in names if "implicit" not in name):
            share = torch.tensor([1 - row[ours] / row[other] for row in rows])
            drawn = torch.randint(len(rows), (10_000, len(rows)), generator=seeded(0))
            low, high = share[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
            found[f"{ours} below {other}"] = {
                "mean share": round(float(share.mean()), 4),
                "interval": [round(low, 4), round(high, 4)],
                "least share": round(float(share.min()), 4),
                f"photos at {GOAL:.0%} or more": int((share >= GOAL).sum()),
            }
    return found


def _known(out: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Reads the rows of a run with the same settings."""
    if out is None or not out.exists():
        return {}
    kept = json.loads(out.read_text())
    if kept["settings"] != settings:
        raise SystemExit(f"{out} is of other settings, {kept['settings']}; name another file")
    return kept["rows"]


def _photo(
    photo: Path,
    backbone: Backbone,
    options: Mapping[str, Any],
    args: argparse.Namespace,
    panels: list[tuple[str, Image.Image]],
) -> dict[str, Any]:
    """Measures one photograph, and adds its pictures to ``panels``."""
    size = (args.size[0], args.size[1])
    shown = resize(read_image(photo), size)
    image = preprocess(shown, mean=backbone.mean, std=backbone.std)
    stack = None if args.jbu is None else load_upsampler(weights=args.jbu)
    with torch.inference_mode():
        source = backbone(image)
        maps = {name: F.interpolate(source, size, mode=name) for name in ("bilinear", "bicubic")}
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
            "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **{metric: round(value, 4) for metric, value in upsampler.scores.items()},
        }
        maps[name] = upsampler.features()
    if args.sheet:
        basis = fit_pca(source)
        panels.append(("image", shown))
        for name, features in {"source": source, **maps}.items():
            colours = pca_rgb(features, basis)[0].mul(255).byte().permute(1, 2, 0)
            panels.append((name, Image.fromarray(colours.numpy())))
    return {"errors": errors(image, backbone, maps, args.views), "fits": spent}


@torch.inference_mode()
def errors(
    image: Tensor, backbone: Backbone, maps: Mapping[str, Tensor], count: int, directions: int = 32
) -> dict[str, float]:
    """Returns the share of the variation of new views that each map leaves unexplained."""
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


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
