"""Results of a protocol: a few sums per image and upsampler, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.files import write_atomically

__all__ = ["Measurement", "measure_new"]

VERSION = 5
"""Raise this if the meaning of a measurement changes."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Results of one protocol on one data set, for every upsampler.

    Attributes:
        protocol: Such as ``point oracle``.
        data: Such as ``camvid/val``.
        backbone: Backbone of the features, and the stride; for the oracle only the stride.
        block: Number of neighbouring images that are correlated, see ``Dataset``.
        sums: Upsampler -> name of the sums -> one tensor per image.
    """

    protocol: str
    data: str
    backbone: str
    block: int = 1
    sums: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)

    def add(self, upsampler: str, sums: dict[str, Tensor]) -> None:
        """Adds one image's sums."""
        known = self.sums.setdefault(upsampler, {})
        for name, value in sums.items():
            known.setdefault(name, []).append(value)


def measure_new(
    run: Callable[[Sequence[Candidate]], Sequence[Measurement]],
    candidates: Sequence[Candidate],
    settings: dict[str, object] | None,
    cache: Path | None,
) -> list[Measurement]:
    """Measures the upsamplers that are not in the cache, and adds them to it.

    One file per upsampler; its name is a digest of the settings and of the upsampler's identity.

    Args:
        run: Measures upsamplers.
        candidates: Upsamplers.
        settings: Everything else that the sums depend on; None disables the cache.
        cache: Folder of the files; None disables the cache.

    Returns:
        Measurements of all upsamplers, in the order given.
    """
    places: dict[str, Path] = {}
    if cache is not None and settings is not None:
        for each in candidates:
            if each.identity is not None:
                key = [VERSION, settings, each.identity]
                content = json.dumps(key, sort_keys=True, default=str)
                name = hashlib.sha256(content.encode()).hexdigest()[:24]
                places[each.name] = cache / "sums" / f"{name}.pt"
    known = {name: _load(place, name) for name, place in places.items() if place.is_file()}
    new = [each for each in candidates if each.name not in known]
    fresh = run(new) if new else []
    for each in new:
        found = [replace(part, sums={each.name: part.sums[each.name]}) for part in fresh]
        known[each.name] = found
        if place := places.get(each.name):
            place.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(place) as partial:
                torch.save([vars(part) for part in found], partial)
    columns = zip(*(known[each.name] for each in candidates), strict=True)
    return [
        replace(parts[0], sums={name: sums for part in parts for name, sums in part.sums.items()})
        for parts in columns
    ]


def _load(place: Path, upsampler: str) -> list[Measurement]:
    """Reads one upsampler's measurements; ``upsampler`` is its current name."""
    return [
        Measurement(**{**part, "sums": {upsampler: sums}})
        for part in torch.load(place, weights_only=True)
        for sums in part["sums"].values()
    ]
