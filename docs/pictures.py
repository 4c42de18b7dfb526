"""Draws the pictures of the documentation, and runs the notebook: ``python docs/pictures.py``.

Everything is drawn from the photographs in tests/data, which are free, with the shipped models. The
results stand beside this file. ``tests/test_docs.py`` compares the notebook's outputs.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import Tensor

import featup_hub
from featup_hub.image import normalise, read_image, resize
from featup_hub.visualize import PCABasis, contact_sheet, fit_pca, pca_rgb

DOCS = Path(__file__).parent
PHOTOS = DOCS.parent / "tests/data"
MODEL = "efficientnet_lite0"


def picture(features: Tensor, basis: PCABasis) -> Image.Image:
    """Features in the colours of a basis."""
    colours = pca_rgb(features, basis)[0].permute(1, 2, 0)
    return Image.fromarray((colours * 255).round().byte().numpy())


def opened(name: str, size: int) -> tuple[Image.Image, Tensor, featup_hub.UpsampledBackbone]:
    """A photograph at a size, the tensor of it, and the model."""
    model = featup_hub.load(MODEL)
    shown = resize(read_image(PHOTOS / name), size, multiple_of=model.patch_size)
    return shown, normalise(shown, mean=model.mean, std=model.std), model


def stages() -> Image.Image:
    """The features of a cat at the size of every stage."""
    shown, image, model = opened("chelsea.jpg", 224)
    source = model.source(image)
    kernels = model.upsampler.kernels(image, (source.shape[2], source.shape[3]))
    levels = model.upsampler.pyramid(source, kernels)
    basis = fit_pca(source)
    panels = [("image", shown)]
    panels += [(f"{f.shape[2]} x {f.shape[3]}", picture(f, basis)) for f in levels]
    return contact_sheet(panels, size=shown.size, columns=3)


def kernels() -> Image.Image:
    """The 7×7 weights of the joint bilateral stage and of the stage after it, at three pixels."""
    shown, image, model = opened("chelsea.jpg", 224)
    height, width = image.shape[-2:]
    kernels = model.upsampler.kernels(image, (height // 16, width // 16))
    assert kernels.first is not None
    joint, learned = kernels.first.upsampling[-1], kernels.stages[0]
    panels = []
    for name, (y, x) in {"cheek": (150, 60), "ear": (46, 247), "rim of the eye": (100, 92)}.items():
        step = height // joint.shape[2]
        reach = 3 * step + step // 2
        around = shown.crop((x - reach, y - reach, x + reach, y + reach))
        panels.append((f"{name}: image", around))
        for title, stage in (("joint filter", joint), ("next stage", learned)):
            step = height // stage.shape[2]
            weights = stage[0, :, y // step, x // step].view(7, 7)
            grey = (weights / weights.max()).clamp(0, 1)
            tile = Image.fromarray((grey * 255).round().byte().numpy()).convert("RGB")
            panels.append((title, tile.resize((224, 224), Image.Resampling.NEAREST)))
    return contact_sheet(panels, size=(224, 224), columns=3)


def upsamplers() -> Image.Image:
    """The same features by both shipped upsamplers."""
    panels = []
    for name in ("chelsea.jpg", "astronaut.jpg"):
        shown, image, model = opened(name, 320)
        source = model.source(image)
        basis = fit_pca(source)
        panels.append(("image", shown))
        for weights in ("jbu_denoise", "jbu_faithful"):
            upsampler = featup_hub.load_upsampler(weights)
            panels.append((weights, picture(upsampler(source, image), basis)))
    return contact_sheet(panels, size=(400, 320), columns=3)


def looks() -> Image.Image:
    """One look and four looks, before and after upsampling."""
    shown, image, one = opened("astronaut.jpg", 320)
    four = featup_hub.load(MODEL, looks=4)
    basis = fit_pca(one.source(image), four.source(image))
    panels = [("image", shown)]
    for title, model in (("one look", one), ("four looks", four)):
        source = model.source(image)
        panels.append((f"{title}: source", picture(source, basis)))
        panels.append((f"{title}: upsampled", picture(model.upsampler(source, image), basis)))
    return contact_sheet(panels, size=shown.size, columns=5)


def clip(frames: int = 24, size: int = 224) -> list[Image.Image]:
    """A camera that pans over a photograph: patches beside upsampled features."""
    model = featup_hub.load(MODEL)
    photo = read_image(PHOTOS / "coffee.jpg")
    photo = photo.resize((round(photo.width * size / photo.height), size))
    reach = photo.width - size
    basis, sheets = None, []
    for frame in range(frames):
        away = abs(2 * frame / frames - 1)  # there and back
        left = round(reach * (1 - away))
        shown = photo.crop((left, 0, left + size, size))
        image = normalise(shown, mean=model.mean, std=model.std)
        source = model.source(image)
        basis = basis or fit_pca(source)
        panels = [
            ("image", shown),
            ("patches", picture(source, basis)),
            ("upsampled", picture(model.upsampler(source, image), basis)),
        ]
        sheets.append(contact_sheet(panels, size=(size, size), columns=3))
    return sheets


def executed(path: Path) -> nbformat.NotebookNode:
    """Runs a notebook and returns it with its outputs: texts, and pictures as small JPEG files."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


@torch.inference_mode()
def main() -> None:
    """Writes all pictures, then the outputs of the notebook."""
    for draw in (stages, kernels, upsamplers, looks):
        draw().save(DOCS / f"{draw.__name__}.webp", quality=88, method=6)
    first, *rest = clip()
    first.save(
        DOCS / "clip.webp", save_all=True, append_images=rest, duration=120, loop=0, quality=70
    )
    notebook = executed(DOCS / "featup_hub.ipynb")
    nbformat.write(notebook, DOCS / "featup_hub.ipynb")


if __name__ == "__main__":
    main()
