"""Sums measured before, kept on disk: an interrupted run goes on, a new upsampler joins old ones.

An entry is one upsampler in one stage of a run. Its name is a digest of everything that decides
the sums: the stage's settings, images and backbone, and the upsampler's own file or source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.measurement import Measurement
from featup_hub.weights import metadata, read, write

__all__ = ["Stage", "run_stage"]

VERSION = 3
"""To be raised by whoever changes what any measurement means."""


class Stage(NamedTuple):
    """One protocol on one data set and backbone.

    Attributes:
        title: What is measured, for people.
        settings: Everything but the upsamplers that decides its sums; None is never kept.
        run: Measures upsamplers.
        block: Neighbouring images that are alike, see :class:`~featup_hub.evaluation.Folder`.
    """

    title: str
    settings: dict[str, object] | None
    run: Callable[[Sequence[Candidate]], Sequence[Measurement]]
    block: int = 1


def run_stage(
    stage: Stage, candidates: Sequence[Candidate], cache: Path | None
) -> list[Measurement]:
    """Measures the upsamplers that were not measured before, and keeps what they leave.

    Args:
        stage: What to measure.
        candidates: Upsamplers.
        cache: Folder of what was kept; None keeps nothing.

    Returns:
        Measurements with all upsamplers, in the order given.

    Raises:
        ValueError: If the stage left nothing to score.
    """
    places = {each.name: _place(cache, stage.settings, each) for each in candidates}
    known = {
        name: _recall(place, name) for name, place in places.items() if place and place.is_file()
    }
    new = [each for each in candidates if each.name not in known]
    fresh = stage.run(new) if new else []
    if any(each.name not in found.sums for found in fresh for each in new):
        raise ValueError(f"at least one image is needed to score; got none for {stage.title}")
    for each in new:
        known[each.name] = [found.only(each.name) for found in fresh]
        place = places[each.name]
        if place:
            _keep(known[each.name], place)
    columns = zip(*(known[each.name] for each in candidates), strict=True)
    return [
        replace(
            parts[0],
            block=stage.block,
            sums={name: sums for part in parts for name, sums in part.sums.items()},
        )
        for parts in columns
    ]


def _place(
    cache: Path | None, settings: dict[str, object] | None, upsampler: Candidate
) -> Path | None:
    """Returns where an upsampler's sums are kept; None where they must not be."""
    if cache is None or settings is None or upsampler.identity is None:
        return None
    content = json.dumps([VERSION, settings, upsampler.identity], sort_keys=True, default=str)
    return cache / "sums" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors"


def _keep(found: Sequence[Measurement], place: Path) -> None:
    """Writes one upsampler's measurements, each tensor of sums as ``NUMBER NAME``."""
    tensors = {
        f"{number} {name}": torch.stack(values)
        for number, each in enumerate(found)
        for sums in each.sums.values()
        for name, values in sums.items()
    }
    titles = [(each.protocol, each.data, each.backbone) for each in found]
    place.parent.mkdir(parents=True, exist_ok=True)
    write(tensors, place, metadata={"titles": json.dumps(titles)})


def _recall(place: Path, upsampler: str) -> list[Measurement]:
    """Reads what :func:`_keep` wrote, under the name the upsampler has now."""
    found = [
        Measurement(protocol=protocol, data=data, backbone=backbone, sums={upsampler: {}})
        for protocol, data, backbone in json.loads(metadata(place)["titles"])
    ]
    for key, values in read(place).items():
        number, _, name = key.partition(" ")
        found[int(number)].sums[upsampler][name] = list(values)
    return found
