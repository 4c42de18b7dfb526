"""What an evaluation measures; the command line's flags are these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Literal, get_args

Reduction = Literal["point", "area"]
Protocol = Literal[
    "oracle", "preservation", "transfer", "consistency", "propagation", "cost", "cam"
]

_AT_LEAST: Mapping[int, tuple[str, ...]] = {
    0: ("train_images", "transfer_images", "val_images", "photo_images", "max_side"),
    1: ("cost_images", "probe_steps", "pixels", "resamples"),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What a run measures.

    Attributes:
        data: Labelled data, each ``LAYOUT:FOLDER``; layouts are folder, camvid, ccp, nyu, bsds,
            davis, voc, ade20k, cityscapes, coco-stuff and nyuv2.
        upsamplers: Each a baseline (nearest, bilinear, bicubic, joint_bilateral), a weights file,
            ``FILE@unit`` (kernels divided by their sum) or a plug-in ``module:callable``;
            ``NAME=`` in front names it in tables.
        backbones: Backbones that give the features: each ``NAME``, ``NAME=FILE`` with weights of
            your own, or a plug-in ``module:callable`` that returns a backbone, which tables call by
            the callable's name.
        protocols: What to measure: label oracle, frozen probe (preservation), probe of each
            upsampler's own features (transfer), multi-view consistency, propagation of a first
            frame's mask through videos, time and memory (cost), class activation maps (cam).
        looks: Numbers of looks of the backbone at an image, 1, 4, 9 …; every upsampler is measured
            with each number, but oracle and cam take one look only.
        strides: Cell sizes of the label oracle, in pixels. It reduces labels to cells and upsamples
            them.
        reductions: Ways in which the label oracle downsamples.
        versus: References of the paired differences. Defaults that are not evaluated are left out.
        train_images: Images a frozen probe is fitted on, evenly spread; 0 for all.
        transfer_images: Images a transfer probe is fitted on, evenly spread; 0 for all.
        val_images: Images scored, or videos by propagation, evenly spread; 0 for all.
        cost_images: Images on which time and memory are measured.
        max_side: Images with a longer side are resized to it; 0 keeps every image as it is.
        probe_steps: Optimiser steps of a segmentation probe.
        pixels: Random pixels of each image that a transfer probe learns from.
        photos: Folder of photographs for class activation maps.
        photo_images: Photographs to measure, evenly spread; 0 for all.
        classifier: Model with a classifier, for class activation maps.
        cache: Folder that keeps features and sums, so that a stopped run can resume. Empty it if a
            file changes that a plug-in loads besides its own.
        resamples: Bootstrap replicates over images.
        seed: Seed of all random numbers.

    Raises:
        ValueError: If a number is out of its range, or a protocol or reduction is unknown.
    """

    data: tuple[str, ...] = ()
    upsamplers: tuple[str, ...] = ("nearest", "bilinear", "bicubic", "joint_bilateral")
    backbones: tuple[str, ...] = ("efficientnet_lite0",)
    protocols: tuple[Protocol, ...] = ("oracle", "preservation")
    looks: tuple[int, ...] = (1,)
    strides: tuple[int, ...] = (8, 14, 16, 32)
    reductions: tuple[Reduction, ...] = ("point", "area")
    versus: tuple[str, ...] = ("bilinear", "bicubic")
    train_images: int = 0
    transfer_images: int = 100
    val_images: int = 0
    cost_images: int = 5
    max_side: int = 0
    probe_steps: int = 600
    pixels: int = 1024
    photos: Path | None = None
    photo_images: int = 200
    classifier: str = "efficientnet_lite0"
    cache: Path | None = None
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                if not getattr(self, name) >= least:
                    raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if not all(stride >= 1 for stride in self.strides):
            got = ", ".join(map(str, self.strides))
            raise ValueError(f"strides must be at least 1 pixel each; got {got}")
        if not self.looks or not all(n >= 1 and isqrt(n) ** 2 == n for n in self.looks):
            got = ", ".join(map(str, self.looks)) or "none"
            raise ValueError(f"looks must be square numbers, 1, 4, 9 …; got {got}")
        for name, hint in (("protocols", Protocol), ("reductions", Reduction)):
            values, choices = getattr(self, name), get_args(hint)
            if not values or not set(values) <= set(choices):
                got = ", ".join(map(str, values)) or "none"
                raise ValueError(f"{name} must be of {', '.join(choices)}; got {got}")
