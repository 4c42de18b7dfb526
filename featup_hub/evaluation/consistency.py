r"""Multi-view consistency: do upsampled features explain the backbone's features of other views?

A view is a magnified, perhaps mirrored part of a photograph. Upsampled features are transformed
like the view and downsampled to the backbone's grid. They are compared with the backbone's own
features of the view. The error is the unexplained share of the variation:

.. math:: \sum |P f(t(x)) - \sigma_\downarrow(t(\uparrow P f(x)))|^2 \,/\, \sum |P f(t(x)) - m|^2

P projects on random directions of standardised features; m is their mean. The downsampler is one
blur kernel over a cell, fitted by least squares on other photographs for each upsampler, so no
upsampler profits from its own training downsampler.

Source: the objective of Fu, Hamilton et al., "FeatUp", ICLR 2024, eqs. 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.features import Bench, with_looks
from featup_hub.evaluation.sums import Results

SIDE = 224
FIT_IMAGES = 30
VIEWS = 3  # of each photograph
DIRECTIONS = 16  # in which features are compared
MAX_ZOOM = 2.0
MAX_TAPS = 16
RIDGE = 1e-4


@torch.inference_mode()
def measure_consistency(bench: Bench, candidates: Sequence[Candidate]) -> Results:
    """Fits downsamplers on training images and scores the others, all cropped to squares.

    They have about 224² pixels, or the size that a backbone of fixed size sees.

    The sums of a photograph are ``consistency`` (2,): squared error and squared variation.
    """
    backbone, stride = bench.source.backbone, bench.stride
    height, width = (-(-n // stride) * stride for n in backbone.fixed_size or (SIDE, SIDE))
    fit, test = (
        [images[index].square((height, width)) for index in range(len(images))]
        for images in (bench.train.spread(FIT_IMAGES), bench.val)
    )
    generator = torch.Generator().manual_seed(bench.config.seed)
    weight, mean = _directions([backbone(image) for image in fit], generator)
    plans = [[_View.draw(generator) for _ in range(VIEWS)] for _ in (*fit, *test)]
    encoders = {looks: with_looks(backbone, looks) for looks in {1, *(c.looks for c in candidates)}}

    def examples(
        image: Tensor, views: Sequence[_View]
    ) -> Iterator[tuple[Candidate, Tensor, Tensor]]:
        """Yields each upsampler, its downsampler's inputs, and its targets, (K·V·h·w,)."""
        sources = {looks: encode(image) for looks, encode in encoders.items()}
        encoded = encoders[1](torch.cat([view.apply(image) for view in views]))
        targets = torch.einsum("kc,vchw->kvhw", weight, encoded).flatten()
        for each in candidates:
            size = (image.shape[-2], image.shape[-1])
            upsampled = each.project(sources[each.looks], image, size, weight)
            shown = torch.cat([view.apply(upsampled) for view in views]).transpose(0, 1)
            yield each, _cells(shown, mean, stride), targets

    grams = {each.name: torch.zeros(()) for each in candidates}
    moments = {each.name: torch.zeros(()) for each in candidates}
    for image, views in zip(fit, plans[: len(fit)], strict=True):
        for each, inputs, targets in examples(image, views):
            grams[each.name] = grams[each.name] + inputs.t() @ inputs
            moments[each.name] = moments[each.name] + inputs.t() @ targets
    kernels = {name: _solve(grams[name], moments[name]) for name in grams}
    for image, views in zip(test, plans[len(fit) :], strict=True):
        for each, inputs, targets in examples(image, views):
            error = inputs @ kernels[each.name] - targets
            variation = targets - mean.repeat_interleave(len(targets) // DIRECTIONS)
            sums = torch.stack([error.square().sum(), variation.square().sum()])
            yield "consistency", each.name, {"consistency": sums.double()}


class _View(NamedTuple):
    """A magnified part of an image: zoom, place of the part in [0, 1], and whether mirrored."""

    zoom: float
    top: float
    left: float
    mirrored: bool

    @classmethod
    def draw(cls, generator: torch.Generator) -> _View:
        zoom, top, left, coin = torch.rand(4, generator=generator).tolist()
        return cls(1 + zoom * (MAX_ZOOM - 1), top, left, coin < 0.5)

    def apply(self, x: Tensor) -> Tensor:
        """Transforms an image, or features of its size, (B, C, H, W)."""
        height, width = x.shape[-2:]
        rows, columns = round(height / self.zoom), round(width / self.zoom)
        top, left = round((height - rows) * self.top), round((width - columns) * self.left)
        part = x[:, :, top : top + rows, left : left + columns]
        part = part.flip(3) if self.mirrored else part
        return F.interpolate(part, (height, width), mode="bilinear", align_corners=False)


def _directions(features: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws directions of standardised features, (K, C); returns also the projected mean, (K,)."""
    cells = torch.cat([each[0].flatten(1) for each in features], dim=1)
    weight = torch.randn(DIRECTIONS, cells.shape[0], generator=generator) / cells.shape[0] ** 0.5
    # A channel that is almost constant here, as after a ReLU, would dominate in other images.
    deviation = cells.std(1)
    weight = weight / deviation.clamp(min=1e-2 * float(deviation.mean()) + 1e-12)
    return weight, weight @ cells.mean(1)


def _cells(views: Tensor, mean: Tensor, stride: int) -> Tensor:
    """Returns the downsampler's inputs: taps of each cell and the mean, (K·V·h·w, T + 1).

    ``views`` are (K, V, H, W).
    """
    pooled = next(n for n in range(1, stride + 1) if stride % n == 0 and stride // n <= MAX_TAPS)
    taps = stride // pooled
    views = F.avg_pool2d(views, pooled)
    windows = F.unfold(views.flatten(0, 1)[:, None], taps, stride=taps)  # (K·V, T, h·w)
    windows = windows.transpose(1, 2).flatten(0, 1)
    return torch.cat([windows, mean.repeat_interleave(len(windows) // DIRECTIONS)[:, None]], dim=1)


def _solve(gram: Tensor, moment: Tensor) -> Tensor:
    gram = gram.double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, moment.double()).float()
