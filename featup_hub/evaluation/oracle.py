"""The label oracle: how well an upsampler restores downsampled ground truth.

It needs no backbone. One-hot labels (and depth, if there is any) are downsampled by a stride,
upsampled with the image as guidance, and compared with the original. There are two ways to
downsample. ``point`` takes the pixel at each cell's centre, so edge positions must come from the
guidance: judge by this one. ``area`` averages each cell. Averages contain sub-pixel edge positions,
so plain bicubic does well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import Reduction
from featup_hub.evaluation.dataset import Dataset, Sample
from featup_hub.evaluation.sums import Measurement

__all__ = ["measure_oracle"]


@torch.inference_mode()
def measure_oracle(
    val: Dataset, candidates: Sequence[Candidate], *, stride: int, reductions: Sequence[Reduction]
) -> list[Measurement]:
    """Runs the label oracle at one stride: one measurement per way to downsample."""
    found = {
        reduction: Measurement(
            protocol=f"{reduction} oracle",
            data=val.name,
            backbone=f"stride {stride}",
            block=val.block,
        )
        for reduction in reductions
    }
    for index in range(len(val)):
        measured = oracle_sums(
            val[index], candidates, classes=val.classes, stride=stride, reductions=reductions
        )
        for name, reduction, sums in measured:
            found[reduction].add(name, sums)
    return list(found.values())


def reduce_map(values: Tensor, stride: int, reduction: Reduction) -> Tensor:
    """Downsamples a map by a stride, (C, H, W) -> (C, H/stride, W/stride).

    The centre of a cell of even side lies between pixels; ``point`` takes the next pixel.
    """
    if reduction == "area":
        return F.avg_pool2d(values[None], stride)[0]
    return values[:, stride // 2 :: stride, stride // 2 :: stride]


def oracle_sums(
    sample: Sample,
    candidates: Sequence[Candidate],
    *,
    classes: int,
    stride: int,
    reductions: Sequence[Reduction],
) -> Iterator[tuple[str, Reduction, dict[str, Tensor]]]:
    """Measures every upsampler on one image.

    Args:
        sample: Image with labels, with depth, or both.
        candidates: Upsamplers.
        classes: Number of classes of the labels.
        stride: Side of a cell in pixels.
        reductions: Ways to downsample.

    Yields:
        The upsampler's name, the way to downsample, sums of the image.
    """
    sample = sample.crop(stride)
    image = sample.normalised()
    size = (image.shape[-2], image.shape[-1])
    maps, present = _maps(sample)
    for each in candidates:
        coarse = [reduce_map(maps, stride, reduction)[None] for reduction in reductions]
        if each.head == "before":  # so that both ways share the kernels
            fine = each(torch.cat(coarse, 1), image, size).split(maps.shape[0], 1)
        else:
            fine = tuple(each(source, image, size) for source in coarse)
        for reduction, output in zip(reductions, fine, strict=True):
            labels = present[output[0, : len(present)].argmax(0)] if len(present) else None
            yield each.name, reduction, sample.sums(labels, output[0, -1], classes)


def _maps(sample: Sample) -> tuple[Tensor, Tensor]:
    """Stacks one-hot labels of the classes present, and depth; returns the classes too."""
    maps, present = [], torch.zeros(0, dtype=torch.long)
    if sample.labels is not None:
        present = sample.labels[sample.labels >= 0].unique()
        if not len(present):  # all void: no pixel is compared, any class will do
            present = torch.zeros(1, dtype=torch.long)
        maps.append((sample.labels == present[:, None, None]).float())
    if sample.depth is not None:
        missing = sample.depth <= 0  # filled, so that holes do not affect their neighbours
        maps.append(sample.depth.masked_fill(missing, sample.depth[~missing].mean())[None])
    return torch.cat(maps), present
