"""The label oracle: how well an upsampler restores downsampled ground truth.

It needs no backbone. One-hot labels (and depth, if there is any) are downsampled by a stride,
upsampled with the image as guidance, and compared with the original. There are two ways to
downsample. ``point`` takes the pixel at each cell's centre, so edge positions must come from the
guidance: judge by this one. ``area`` averages each cell. Averages contain sub-pixel edge positions,
so plain bicubic does well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import Reduction
from featup_hub.evaluation.dataset import Dataset, Sample
from featup_hub.evaluation.sums import Results


@torch.inference_mode()
def measure_oracle(
    val: Dataset, candidates: Sequence[Candidate], *, stride: int, reductions: Sequence[Reduction]
) -> Results:
    """Runs the label oracle at one stride: one protocol per way to downsample."""
    for index in range(len(val)):
        sample = val[index].crop(stride)
        image = sample.normalised()
        maps, present = _maps(sample)
        coarse = [_reduced(maps, stride, way)[None] for way in reductions]
        for each in candidates:
            if each.head == "before":  # so that both ways share the kernels
                fine = each(torch.cat(coarse, 1), image, sample.size).split(maps.shape[0], 1)
            else:
                fine = tuple(each(source, image, sample.size) for source in coarse)
            for way, output in zip(reductions, fine, strict=True):
                labels = present[output[0, : len(present)].argmax(0)] if len(present) else None
                yield f"{way} oracle", each.name, sample.sums(labels, output[0, -1], val.classes)


def _reduced(values: Tensor, stride: int, way: Reduction) -> Tensor:
    """Downsamples a map by a stride, (C, H, W) -> (C, H/stride, W/stride)."""
    if way == "area":
        return F.avg_pool2d(values[None], stride)[0]
    # The centre of a cell of even side lies between pixels; this is the next pixel.
    return values[:, stride // 2 :: stride, stride // 2 :: stride]


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
