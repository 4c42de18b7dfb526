"""Results of a protocol: a few sums per image and upsampler, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featup_hub.evaluation.candidates import Candidate
from featup_hub.files import write_atomically

VERSION = 8
"""Raise this if the meaning of a measurement changes."""

Results = Iterator[tuple[str, str, dict[str, Tensor]]]
"""Of every image and upsampler: the protocol's name in tables, the upsampler's, named sums."""

Sums = dict[str, dict[str, Tensor]]
"""Upsampler -> name of the sums -> sums of every image, (N, *S)."""


class Measurement(NamedTuple):
    """Results of one protocol on one data set, for every upsampler."""

    protocol: str  # such as "point oracle"
    data: str  # such as "camvid/val"
    backbone: str  # of the features, and the stride; for the oracle only the stride
    block: int  # number of neighbouring images that are correlated
    sums: Sums


def measure_new(
    run: Callable[[Sequence[Candidate]], Results],
    candidates: Sequence[Candidate],
    settings: dict[str, object] | None,
    cache: Path | None,
) -> dict[str, Sums]:
    """Measures the upsamplers that are not in the cache, and adds them to it.

    One file per upsampler; its name is a digest of the settings and of the upsampler's identity.
    ``settings`` are all that sums depend on besides the upsampler. Without them, or without a
    folder, nothing is kept. Returns the sums of all upsamplers, in the order given, by protocol.
    """
    places: dict[str, Path] = {}
    for each in candidates:
        if cache is not None and settings is not None and each.identity is not None:
            key = json.dumps([VERSION, settings, each.identity], sort_keys=True, default=str)
            name = hashlib.sha256(key.encode()).hexdigest()[:24]
            places[each.name] = cache / "sums" / f"{name}.pt"
    known: dict[str, dict[str, dict[str, Tensor]]] = {
        name: _read(place) for name, place in places.items() if place.is_file()
    }
    new = [each for each in candidates if each.name not in known]
    images: dict[str, dict[str, dict[str, list[Tensor]]]] = {each.name: {} for each in new}
    for protocol, upsampler, sums in run(new) if new else ():
        for name, value in sums.items():
            images[upsampler].setdefault(protocol, {}).setdefault(name, []).append(value)
    for upsampler, protocols in images.items():
        known[upsampler] = {
            protocol: {name: torch.stack(values) for name, values in sums.items()}
            for protocol, sums in protocols.items()
        }
        if place := places.get(upsampler):
            place.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(place) as partial:
                torch.save(known[upsampler], partial)
    every = known[candidates[0].name]
    return {name: {each.name: known[each.name][name] for each in candidates} for name in every}


def _read(place: Path) -> dict[str, dict[str, Tensor]]:
    """Reads the sums of one upsampler by protocol."""
    try:
        sums: dict[str, dict[str, Tensor]] = torch.load(place, weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise any exception
        # torch's message advises unsafe unpickling, so it is not shown.
        raise ValueError(
            f"the cache must hold whole files; {place} cannot be read ({type(error).__name__}); "
            "remove it to measure its upsampler again"
        ) from None
    return sums
