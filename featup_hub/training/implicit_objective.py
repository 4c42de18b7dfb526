"""What a fit of one image minimises: how badly a network and a downsampler explain some views.

The loss of a step is a function of parameters, buffers and what :func:`draw` drew, and of nothing
else, so that several images can be fitted side by side (``torch.func.vmap``) by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featup_hub.training.downsamplers import AttentionDownsampler, SimpleDownsampler
from featup_hub.training.implicit_config import ImplicitConfig
from featup_hub.training.implicit_views import points_of
from featup_hub.training.losses import (
    ScaleNet,
    blur_residual,
    magnitude_tv,
    mean_magnitude,
    reconstruction_loss,
)
from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, apply_jitter
from featup_hub.upsamplers import ImplicitUpsampler
from featup_hub.upsamplers.coordinates import pixel_centres

__all__ = ["Objective", "Sample", "draw", "seeded_modules"]


class Sample(NamedTuple):
    """What one step looks at.

    Attributes:
        chosen: Numbers of the views, (V,).
        jitters: The views.
        points: Where the network tells features, as fractions of height and width: a point in
            every tap of every view, (V, h·taps, w·taps, 2), or every pixel, (1, H, W, 2).
        area: Neighbouring pixels, (1, P, P, 2), or None where ``points`` are all pixels.
        mask: Seed of the dropped inputs.
    """

    chosen: Tensor
    jitters: list[Jitter]
    points: Tensor
    area: Tensor | None
    mask: int


def draw(
    jitters: Sequence[Jitter],
    size: tuple[int, int],
    grid: tuple[int, int],
    config: ImplicitConfig,
    step: int,
) -> Sample:
    """Draws what a step looks at; all of it follows from the seed and the step.

    Args:
        jitters: The views to choose from.
        size: Height and width of the image.
        grid: Height and width of the backbone's features.
        config: How many, and of which kind.
        step: Number of the step.

    Returns:
        What to look at, on the CPU.
    """
    generator = seeded(config.seed, 2, step)
    chosen = torch.randint(len(jitters), (config.batch,), generator=generator)
    views = [jitters[n] for n in chosen.tolist()]
    mask = int(torch.randint(2**62, (), generator=generator)) if config.dropout else 0
    pixels = pixel_centres(*size)
    if not config.taps:
        return Sample(chosen, views, pixels[None], None, mask)
    side = [min(config.patch, n) for n in size]
    top, left = (
        int(torch.randint(n - s + 1, (), generator=generator))
        for n, s in zip(size, side, strict=True)
    )
    area = pixels[None, top : top + side[0], left : left + side[1]]
    taps = (grid[0] * config.taps, grid[1] * config.taps)
    return Sample(chosen, views, points_of(views, taps, generator), area, mask)


class Objective(nn.Module):
    """All that is learned of one image, and the loss that it has.

    Args:
        model: The network.
        config: Downsampler, terms of the loss, precision.
        grid: Height and width of the backbone's features.
        patch_size: Stride of the backbone, in pixels.
    """

    def __init__(
        self,
        model: ImplicitUpsampler,
        config: ImplicitConfig,
        *,
        grid: tuple[int, int],
        patch_size: int,
    ) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        dim, stride = model.directions.shape[1], config.taps or patch_size
        self.model = model
        self.downsampler: AttentionDownsampler | SimpleDownsampler = (
            AttentionDownsampler(dim, stride)
            if config.downsampler == "attention"
            else SimpleDownsampler(stride)
        )
        self.scale = ScaleNet(dim)

    def forward(self, sample: Sample, observed: Tensor) -> Tensor:
        """Returns the loss, (), of views whose coordinates are ``observed``, (V, K, h, w)."""
        config = self.config
        if sample.area is None:
            area = self.tell(sample.points)
            seen = apply_jitter(area.expand(len(sample.jitters), -1, -1, -1), sample.jitters)
            predicted = self.downsampler(seen, self.grid)
        else:
            predicted, area = self.predict(sample.points), self.tell(sample.area)
        scale = self.scale(observed) if config.uncertainty else None
        loss = reconstruction_loss(predicted, observed, scale)
        for weight, term in (
            (config.magnitude_weight, mean_magnitude),
            (config.tv_weight, magnitude_tv),
            (config.blur_weight, blur_residual),
        ):
            if weight:
                loss = loss + weight * term(area)
        return loss

    def held_out(self, jitters: Sequence[Jitter]) -> Tensor:
        """Returns what the backbone should see of views, (V, K, h, w), without chance."""
        taps = (self.grid[0] * self.downsampler.stride, self.grid[1] * self.downsampler.stride)
        return self.predict(points_of(jitters, taps))

    def predict(self, points: Tensor) -> Tensor:
        """Returns what the backbone should see where the taps of its cells are ``points``."""
        return self.downsampler(self.tell(points), self.grid)

    def tell(self, position: Tensor) -> Tensor:
        """Runs the network at fractions of the image, (V, H, W, 2) -> (V, K, H, W)."""
        image, low = self.model.image, self.config.precision == "bfloat16"
        with torch.autocast(image.device.type, torch.bfloat16, enabled=low):
            told = self.model.coordinates(position.to(image).flatten(0, 2))
        return told.float().unflatten(0, position.shape[:3]).permute(0, 3, 1, 2)


@contextmanager
def seeded_modules(seed: int) -> Iterator[None]:
    """Seeds the generator that modules draw from on the CPU, and puts it back afterwards.

    Those of other devices are left alone: what modules draw here, they draw on the CPU.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
