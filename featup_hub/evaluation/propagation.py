"""Propagation: features carry the mask of a video's first frame to the later frames.

No probe is fitted. A position of a later frame takes a softmax-weighted mean of the masks of seven
positions of the first frame: the nearest by cosine similarity within a window. All this runs at a
quarter of the image's size. The mask is averaged down to it, and interpolated bilinearly back.

Source: the protocol of Jabri, Owens, Efros, "Space-Time Correspondence as a Contrastive Random
Walk", NeurIPS 2020, with the first frame as the only context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.dataset import Sample, evenly
from featup_hub.evaluation.features import Bench
from featup_hub.evaluation.scores import mean_iou
from featup_hub.evaluation.sums import Results

SHRINK = 4
NEIGHBOURS = 7
TEMPERATURE = 0.07
RADIUS = 16
TILE = 16


def measure_propagation(bench: Bench, candidates: Sequence[Candidate]) -> Results:
    """Propagates the labels of the first frame of every video to its other frames."""
    looks = {each.looks for each in candidates}
    videos = bench.val.videos()
    for number in evenly(len(videos), bench.config.val_images):
        video = videos[number]
        first: dict[str, Tensor] = {}
        labels = torch.zeros(0)
        for index, (sample, sources) in enumerate(bench.features(video, looks)):
            image = sample.normalised()
            size = (sample.size[0] // SHRINK, sample.size[1] // SHRINK)
            for each in candidates:
                features = F.normalize(each(sources[each.looks], image, size)[0], dim=0)
                if index == 0:
                    first[each.name] = features
                    labels = sample.shares(video.classes, size)
                else:
                    mask = propagate(first[each.name], labels, features)
                    yield "propagation", each.name, _frame_sums(mask, sample, video.classes)


@torch.inference_mode()
def propagate(first: Tensor, labels: Tensor, later: Tensor, *, radius: int = RADIUS) -> Tensor:
    """Carries shares of classes, (K, H, W), from a first frame to a later one.

    Features of both are of unit length, (C, H, W). ``radius`` is half the side of the window.
    """
    height, width = later.shape[-2:]
    result = torch.empty_like(labels)
    near_rows, near_columns = (
        (torch.arange(n)[:, None] - torch.arange(n)).abs() <= radius for n in (height, width)
    )
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = later[:, top : top + TILE, left : left + TILE]
            rows = slice(max(top - radius, 0), top + TILE + radius)
            columns = slice(max(left - radius, 0), left + TILE + radius)
            similar = tile.flatten(1).t() @ first[:, rows, columns].flatten(1)
            near = (
                near_rows[top : top + TILE, None, rows, None]
                & near_columns[None, left : left + TILE, None, columns]
            )
            similar = similar.masked_fill(~near.view(similar.shape), -torch.inf)
            best, index = similar.topk(min(NEIGHBOURS, similar.shape[1]))
            weights = (best / TEMPERATURE).softmax(1)
            carried = labels[:, rows, columns].flatten(1)[:, index]  # (K, N, 7)
            result[:, top : top + TILE, left : left + TILE] = (
                (carried * weights).sum(2).view(-1, *tile.shape[1:])
            )
    return result


def _frame_sums(shares: Tensor, sample: Sample, classes: int) -> dict[str, Tensor]:
    """Scores one frame's shares of classes, (K, h, w); class 0 is the background.

    ``jaccard`` (2,) is the mean intersection over union of the objects, and 1.
    """
    shown = F.interpolate(shares[None], sample.size, mode="bilinear", align_corners=False)
    sums = sample.sums(shown[0].argmax(0), None, classes)
    overlap = mean_iou(sums["confusion"], first=1).nan_to_num(1.0)  # 1 where there is no object
    return {"jaccard": torch.stack([overlap, torch.ones(())]), "band": sums["band"]}
