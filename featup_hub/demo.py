"""A page in the browser that shows similarity of features, per patch and per pixel.

Click a point of a photograph. The page colours every patch and every pixel by the cosine
similarity of its features with those of the point, in this photograph and in a second one. The
other view shows the three main directions of the features as colours. Needs the extra ``[demo]``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from featup_hub.image import normalise, read_image, resize
from featup_hub.loading import find_backbone, list_models, load, nearest_multiple
from featup_hub.model import UpsampledBackbone
from featup_hub.registry import UPSAMPLERS
from featup_hub.visualize import fit_pca, pca_rgb, picture

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        "the demo needs gradio, which is not installed; pip install 'featup_hub[demo]'"
    ) from error

VIEWS = ("similarity", "colours (PCA)")
_KEPT = 6  # photographs whose features stay in memory: about 100 MB each at 448×448
_SHADES = ("#10104a", "#fff080", "#e02040")  # unlike, alike, between


class Point(NamedTuple):
    """A clicked point: its photograph, and its position as shares of the sides."""

    photo: int
    x: float
    y: float


class PhotoFeatures(NamedTuple):
    """A photograph and its features, scaled to length one."""

    image: Image.Image  # RGB, at the backbone's input size
    patches: Tensor  # one vector per patch, (h, w, C)
    pixels: Tensor  # one vector per pixel, (H, W, C)


@torch.inference_mode()
def compute(model: UpsampledBackbone, photo: Image.Image, size: int) -> PhotoFeatures:
    """Computes the features of a photograph whose short side becomes about ``size`` pixels."""
    stride = model.patch_size
    shown = resize(photo, nearest_multiple(size, stride), multiple_of=stride)
    image = normalise(shown, mean=model.mean, std=model.std)
    source = model.source(image)
    maps = (source, model.upsampler(source, image))
    patches, pixels = (F.normalize(m[0].permute(1, 2, 0).contiguous(), dim=-1) for m in maps)
    return PhotoFeatures(shown, patches, pixels)


def similarity(
    query: PhotoFeatures, point: tuple[float, float], other: PhotoFeatures
) -> tuple[Tensor, Tensor]:
    """Compares the features at a point with the features everywhere in a photograph.

    The point is its x and y as shares of the width and the height. Returns cosine similarities: of
    every patch with the point's patch, (h, w), and of every pixel with the point's, (H, W).
    """

    def compare(asked: Tensor, searched: Tensor) -> Tensor:
        height, width = asked.shape[:2]
        x, y = min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)
        return searched @ asked[y, x]

    return compare(query.patches, other.patches), compare(query.pixels, other.pixels)


def draw_similarity(
    similarities: Tensor, low: float, image: Image.Image, strength: float
) -> Image.Image:
    """Draws similarities, (h, w), over a photograph: dark at ``low``, bright at 1."""
    levels = ((similarities - low) / max(1 - low, 1e-6)).clamp(0, 1)
    grey = Image.fromarray((levels * 255).round().byte().numpy())
    return _overlay(ImageOps.colorize(grey, *_SHADES), image, strength)


def draw_colours(photos: Sequence[PhotoFeatures], strength: float) -> list[Image.Image]:
    """Draws the three main directions of the features as red, green and blue.

    All photographs share one basis, so equal colours mean similar features. Returns two pictures of
    each: of its patches and of its pixels.
    """
    maps = [[m.permute(2, 0, 1)[None] for m in (p.patches, p.pixels)] for p in photos]
    basis = fit_pca(*(patches for patches, _ in maps))
    pictures = []
    for photo, pair in zip(photos, maps, strict=True):
        for features in pair:
            colours = picture(pca_rgb(features, basis))
            pictures.append(_overlay(colours, photo.image, strength))
    return pictures


def _overlay(colours: Image.Image, image: Image.Image, strength: float) -> Image.Image:
    if colours.size != image.size:
        colours = colours.resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, colours, strength)


def _draw(
    photos: Sequence[PhotoFeatures | None], view: str, strength: float, point: Point | None
) -> list[Image.Image | None]:
    """Draws both pictures of both photographs; None for a missing photograph."""
    present = [photo for photo in photos if photo is not None]
    query = None if point is None else photos[point.photo]
    drawn: list[Image.Image] = []
    if view == VIEWS[1]:
        drawn = draw_colours(present, strength) if present else []
    elif query is None or point is None:
        drawn = [photo.image for photo in present for _ in range(2)]
    else:
        # The photograph's mean similarity is drawn darkest, so that both cells are comparable.
        lows = [float(m.mean()) for m in similarity(query, point[1:], query)]
        for photo in present:
            for similarities, low in zip(similarity(query, point[1:], photo), lows, strict=True):
                shown = draw_similarity(similarities, low, photo.image, strength)
                if photo is query:
                    x, y = point.x * shown.width, point.y * shown.height
                    ImageDraw.Draw(shown).circle((x, y), 6, outline="white", width=2)
                drawn.append(shown)
    pictures = iter(drawn)
    return [None if photo is None else next(pictures) for photo in photos for _ in range(2)]


def build(
    photos: Sequence[Image.Image], *, model: str, upsampler: str, size: int = 448
) -> gr.Blocks:
    """Builds the page; its method ``launch()`` serves it.

    Photographs, at most two, the model, ``NAME`` or ``NAME=FILE``, and the upsampler's name are
    those it shows first. ``size`` is the short side of the backbone's input, in pixels.
    """
    if len(photos) > 2:
        raise ValueError(f"the page shows at most two photographs; got {len(photos)}")

    @functools.lru_cache(maxsize=2)
    def opened(model: str, upsampler: str) -> UpsampledBackbone:
        card, file = find_backbone(model)
        return load(card, backbone_weights=file, upsampler=upsampler)

    @functools.lru_cache(maxsize=_KEPT)
    def computed(
        model: str, upsampler: str, pixels: bytes, shape: tuple[int, int]
    ) -> PhotoFeatures:
        return compute(opened(model, upsampler), Image.frombytes("RGB", shape, pixels), size)

    def show(*values: Any) -> list[Image.Image | None]:
        first, second, view, strength, model, upsampler, point = values
        try:
            features = [
                photo and computed(model, upsampler, photo.tobytes(), photo.size)
                for photo in (first, second)
            ]
        except (ValueError, RuntimeError, OSError) as error:
            raise gr.Error(str(error)) from error
        return _draw(features, view, strength, point)

    def accept(upload: dict[str, Any] | None) -> Sequence[Image.Image | None]:
        """Shows and keeps a small copy, so that a click does not decode the upload again."""
        if upload is None:
            return None, None, None
        path = upload["path"]
        try:
            photo = resize(read_image(path), size)
        except (ValueError, OSError) as error:
            message = str(error).replace(path, Path(path).name)
            raise gr.Error(message, print_exception=False) from error
        return photo, photo, None

    def click(index: int) -> Any:
        def clicked(photo: Any, event: gr.SelectData) -> Point | None:
            x, y = event.index
            return photo and Point(index, (x + 0.5) / photo.width, (y + 0.5) / photo.height)

        return clicked

    with gr.Blocks(title="featup_hub", analytics_enabled=False) as page:
        gr.Markdown(
            "## featup_hub\nClick a point of a photograph. Places with similar features become "
            "bright: patch by patch, as the backbone sees them, and pixel by pixel, upsampled."
        )
        with gr.Row():
            name = gr.Dropdown(list_models(), value=model, label="model", allow_custom_value=True)
            stages = gr.Dropdown(list(UPSAMPLERS), value=upsampler, label="upsampler")
            view = gr.Radio(list(VIEWS), value=VIEWS[0], label="view")
            strength = gr.Slider(0, 1, 0.7, step=0.05, label="overlay strength")
        kept, inputs, outputs = [], [], []
        for index, title in enumerate(("photograph", "second photograph")):
            value = resize(read_image(photos[index]), size) if index < len(photos) else None
            kept.append(gr.State(value))
            with gr.Row():
                inputs.append(
                    gr.Image(value, format="png", label=title, elem_id=f"photo{index + 1}")
                )
                outputs += [
                    gr.Image(
                        format="png",
                        label=f"each {cell}",
                        interactive=False,
                        elem_id=f"{cell}{index + 1}",
                    )
                    for cell in ("patch", "pixel")
                ]
        point = gr.State(None)
        everything = [*kept, view, strength, name, stages, point]
        for index, photo in enumerate(inputs):
            photo.select(click(index), kept[index], point).then(show, everything, outputs)
            # An upload that cannot be read leaves nothing of the photograph before it. Without
            # gradio's preprocessing, which clips 16 bits and hides errors, accept gets the file.
            emptied = photo.input(lambda: (None, None), None, [kept[index], point])
            taken = emptied.then(accept, photo, [photo, kept[index], point], preprocess=False)
            taken.then(show, everything, outputs)
        for control in (view, strength, name, stages):
            control.change(show, everything, outputs, show_progress="hidden")
        page.load(show, everything, outputs)
    return page
