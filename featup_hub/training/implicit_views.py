"""What a fit of one image looks at: its views, seen once and kept compact; points within them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from featup_hub.backbones import Backbone
from featup_hub.training.implicit_config import ImplicitConfig
from featup_hub.training.pca import PCA, fit_pca
from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, apply_jitter, sample_jitter

__all__ = ["Views", "look", "points_of"]

AT_A_TIME = 10  # views in one pass of the backbone


class Views(NamedTuple):
    """Views of an image and what the backbone sees of them.

    Attributes:
        jitters: The views.
        features: Principal components in half precision, (V, K, h, w).
    """

    jitters: list[Jitter]
    features: Tensor

    def split(self, count: int) -> Iterator[Views]:
        """Yields ``count`` views at a time."""
        for first in range(0, len(self.jitters), count):
            part = slice(first, first + count)
            yield Views(self.jitters[part], self.features[part])


def look(image: Tensor, backbone: Backbone, config: ImplicitConfig) -> tuple[PCA, Views, Views]:
    """Shows the backbone all views of an image.

    The features of the first views decide the principal components; of all others only these
    are ever kept.

    Args:
        image: Normalised RGB, (1, 3, H, W).
        backbone: What looks.
        config: How many views of which kind.

    Returns:
        The components, the views to fit, of which the first is the image itself, and those held
        out.
    """
    size = (image.shape[-2], image.shape[-1])
    fitted = [Jitter(), *_draw(size, config, 0, config.views - 1)]
    jitters = fitted + _draw(size, config, 1, config.held_out)
    first = min(max(config.pca_views, 1), len(fitted))
    with torch.no_grad(), _evaluating(backbone):
        raw = torch.cat(list(_see(image, backbone, jitters[:first])))
        pca = fit_pca(raw, config.components)
        kept = [pca.project(raw).half()]
        kept += [pca.project(part).half() for part in _see(image, backbone, jitters[first:])]
    features = torch.cat(kept)
    count = len(fitted)
    return pca, Views(fitted, features[:count]), Views(jitters[count:], features[count:])


def points_of(
    jitters: Sequence[Jitter], grid: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Places a point in every cell of a grid over each view.

    Args:
        jitters: The views.
        grid: Cells down and right.
        generator: Places the points at random in their cells; None takes the middles.

    Returns:
        Points as fractions of the image's height and width, (V, *grid, 2), float64: the image
        is mirrored at its edges.
    """
    shape = (len(jitters), *grid, 2)
    middle = torch.full(shape, 0.5, dtype=torch.float64)
    offset = middle if generator is None else torch.rand(shape, generator=generator).double()
    cell = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"), -1
    )
    place = (cell + offset) / torch.tensor(grid, dtype=torch.float64)
    corner, zoom, flip = (
        torch.tensor(values, dtype=torch.float64).reshape(len(jitters), 1, 1, -1)
        for values in (
            [(j.top, j.left) for j in jitters],
            [j.zoom for j in jitters],
            [(0.0, float(j.flip)) for j in jitters],
        )
    )
    place = torch.where(flip > 0, 1 - place, place)
    image = (corner + place / zoom).abs() % 2
    return torch.minimum(image, 2 - image)


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """Puts a backbone into evaluation mode, and every module of it back into its own."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        # Not backbone.train(), which would wake the normalisations of a backbone half frozen.
        for module, training in modes:
            module.training = training


def _see(image: Tensor, backbone: Backbone, jitters: Sequence[Jitter]) -> Iterator[Tensor]:
    """Yields the features of views, a few at a time."""
    for first in range(0, len(jitters), AT_A_TIME):
        part = jitters[first : first + AT_A_TIME]
        views = apply_jitter(image.expand(len(part), -1, -1, -1), part)
        yield backbone(views.contiguous(memory_format=torch.channels_last)).float()


def _draw(size: tuple[int, int], config: ImplicitConfig, kind: int, count: int) -> list[Jitter]:
    generator = seeded(config.seed, 3, kind)
    return [
        sample_jitter(size, max_pad=config.max_pad, max_zoom=config.max_zoom, generator=generator)
        for _ in range(count)
    ]
