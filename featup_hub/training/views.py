"""Views of an image: the small random transforms whose features must agree with one another.

A jitter is what upstream does to an image (reflect-pad, sometimes zoom, crop at a random offset,
sometimes flip), written as the part of the image that the view shows. It has no resolution of its
own, so one record moves an image and any feature map of it, whatever their strides, alike.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3; distributions agree
with mhamilton723/FeatUp @ 6b5a6c0 (MIT). There a map is mirrored at its outermost pixels' centres,
here at its edge, which lies at the same place at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featup_hub.training.sampling import sample_map

__all__ = ["Jitter", "apply_jitter", "sample_jitter"]


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Which part of an image a view shows, in fractions of the image's height and width.

    A view's point (y, x), both in [0, 1], shows the image's point (top + y/zoom, left + x/zoom),
    x counted from the right where the view is flipped. Outside of [0, 1] the image is mirrored.

    Attributes:
        top: Upper edge of the part shown.
        left: Left edge of the part shown.
        zoom: Magnification, at least 1.
        flip: Whether the view is mirrored left to right.
    """

    top: float = 0.0
    left: float = 0.0
    zoom: float = 1.0
    flip: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether the view is the image itself."""
        return self == Jitter()


def sample_jitter(
    size: tuple[int, int],
    *,
    max_pad: int = 20,
    max_zoom: float = 2.0,
    generator: torch.Generator | None = None,
) -> Jitter:
    """Draws a jitter: pad, zoom with probability ½ by U(1, max_zoom), crop anywhere, flip with ½.

    Without zoom the offset is a whole number of pixels, so that the view is a pure crop.

    Args:
        size: Height and width of the image, in pixels.
        max_pad: Pixels added on every side before cropping.
        max_zoom: Largest magnification.
        generator: Source of randomness; always five draws.

    Returns:
        The jitter.

    Raises:
        ValueError: If ``max_pad`` is negative or ``max_zoom`` below 1.
    """
    if max_pad < 0 or max_zoom < 1:
        raise ValueError(
            "a jitter needs max_pad >= 0 pixels and max_zoom >= 1; "
            f"got max_pad={max_pad}, max_zoom={max_zoom}"
        )
    zooms, amount, down, right, flip = torch.rand(
        5, generator=generator, dtype=torch.float64
    ).tolist()
    zoom = 1 + amount * (max_zoom - 1) if zooms < 0.5 else 1.0
    corner = []
    for pixels, draw in zip(size, (down, right), strict=True):
        slack = (pixels + 2 * max_pad) * zoom - pixels
        offset = draw * slack if zoom > 1 else int(draw * (slack + 1))
        corner.append((offset / zoom - max_pad) / pixels)
    return Jitter(top=corner[0], left=corner[1], zoom=zoom, flip=flip < 0.5)


def apply_jitter(x: Tensor, jitters: Sequence[Jitter]) -> Tensor:
    """Shows the part of every map that its jitter asks for, sampled bilinearly.

    Args:
        x: Images or features, (B, C, H, W).
        jitters: One per sample.

    Returns:
        The views, (B, C, H, W); ``x`` itself where every jitter is the identity.

    Raises:
        ValueError: If there is not one jitter per sample.
    """
    if len(jitters) != x.shape[0]:
        raise ValueError(
            f"apply_jitter needs one jitter per sample, {x.shape[0]}; got {len(jitters)}; "
            "repeat the jitter to move all samples alike"
        )
    if all(jitter.is_identity for jitter in jitters):
        return x
    return torch.cat(
        [sample_map(one, *_shown(j, one)) for one, j in zip(x.split(1), jitters, strict=True)]
    )


def _shown(jitter: Jitter, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the rows and columns of a view lie in the image, mirrored back into it."""
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (x.shape[-2], x.shape[-1])
    )
    if jitter.flip:
        columns = 1 - columns
    return _mirror(jitter.top + rows / jitter.zoom), _mirror(jitter.left + columns / jitter.zoom)


def _mirror(fractions: Tensor) -> Tensor:
    """Brings positions into [0, 1] as mirrors at both ends would show them."""
    around = fractions.abs() % 2
    return torch.minimum(around, 2 - around)
