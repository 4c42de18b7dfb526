"""One run: every upsampler on the same images and features, all protocols asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

from featup_hub.backbones import Backbone
from featup_hub.evaluation.cam import find_classifier, measure_cam, open_network, open_photos
from featup_hub.evaluation.candidates import Candidate, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.consistency import measure_consistency
from featup_hub.evaluation.cost import measure_cost
from featup_hub.evaluation.features import check_backbone, fingerprint, open_backbone, stamp
from featup_hub.evaluation.folders import Folder
from featup_hub.evaluation.layouts import layout_and_root, open_data
from featup_hub.evaluation.ledger import Stage, run_stage
from featup_hub.evaluation.measurement import Bench, Measurement
from featup_hub.evaluation.oracle import measure_oracle
from featup_hub.evaluation.probing import measure_preservation, measure_transfer
from featup_hub.evaluation.report import Row, rows

__all__ = ["check", "evaluate", "measure"]

ON_FEATURES = {
    "preservation": measure_preservation,
    "transfer": measure_transfer,
    "consistency": measure_consistency,
    "cost": measure_cost,
}
IRRELEVANT = {
    *("data", "upsamplers", "backbones", "protocols", "versus", "cache", "resamples"),
    *("strides", "reductions", "cost_images", "photos", "photo_images", "classifier"),
}
"""Fields that decide no sums, or are named in the settings of the stages they decide."""


def evaluate(
    config: EvaluationConfig, *, progress: Callable[[str], None] = lambda _: None
) -> Iterator[list[Row]]:
    """Measures and scores upsamplers side by side.

    Args:
        config: What to measure.
        progress: Called with a line at every step.

    Yields:
        Rows of one protocol, data set and backbone or stride: one per score and upsampler.

    Raises:
        ValueError: If something named does not exist, or data that a protocol needs is missing.
        TypeError: If a plug-in cannot be called as an upsampler.
    """
    candidates = [candidate(spec) for spec in config.upsamplers]
    check(config, candidates)
    backbones = dict(map(open_backbone, config.backbones)) if _looks(config) else {}
    splits = [
        (
            open_data(spec, "train", max_side=config.max_side),
            open_data(spec, "val", max_side=config.max_side),
        )
        for spec in config.data
    ]
    for found in measure(splits, backbones, candidates, config, progress=progress):
        yield rows([found], versus=config.versus, resamples=config.resamples)


def check(config: EvaluationConfig, candidates: Sequence[Candidate]) -> None:
    """Refuses names that cannot be told apart or stand for nothing, and data that is not given.

    Args:
        config: What to measure; its default ``versus`` need not take part.
        candidates: Its upsamplers.

    Raises:
        ValueError: If there are such; the message begins with the field's name.
    """
    names = [each.name for each in candidates]
    if len(set(names)) < len(names):
        raise ValueError(
            f"upsamplers must each have a name of its own; got {', '.join(names)}; write NAME=FILE"
        )
    if config.versus != EvaluationConfig.versus and not set(config.versus) <= set(names):
        raise ValueError(
            f"versus must name upsamplers that take part, {', '.join(names)}; "
            f"got {', '.join(config.versus)}"
        )
    on_data = [name for name in config.protocols if name != "cam"]
    if on_data and not config.data:
        raise ValueError(
            f"data must be given, as LAYOUT:FOLDER, for {', '.join(on_data)}; got none"
        )
    for spec in config.data:
        layout_and_root(spec)
    for spec in config.backbones if _looks(config) else ():
        with _about("backbones"):
            check_backbone(spec)
    if "cam" in config.protocols:
        if config.photos is None:
            raise ValueError("photos must be given, a folder of photographs, for cam; got none")
        with _about("classifier"):
            find_classifier(config.classifier)


def _looks(config: EvaluationConfig) -> bool:
    """Tells whether any backbone is looked through."""
    return any(name in ON_FEATURES for name in config.protocols)


@contextmanager
def _about(field: str) -> Iterator[None]:
    """Puts a field's name before what is refused about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def measure(
    data: Sequence[tuple[Folder, Folder]],
    backbones: Mapping[str, Backbone],
    candidates: Sequence[Candidate],
    config: EvaluationConfig,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Measurement]:
    """Measures upsamplers that are open already.

    Args:
        data: Training and validation split of each data set.
        backbones: By name.
        candidates: Upsamplers.
        config: What to measure; its ``data``, ``upsamplers`` and ``backbones`` are not read.
        progress: Called with a line at every step.

    Yields:
        One measurement per protocol, data set and backbone or stride.
    """
    # Planned as a whole, so that what is missing for the last stage is said before the first.
    for stage in list(_stages(data, backbones, config)):
        progress(stage.title)
        yield from run_stage(stage, candidates, config.cache)


def _stages(
    data: Sequence[tuple[Folder, Folder]],
    backbones: Mapping[str, Backbone],
    config: EvaluationConfig,
) -> Iterator[Stage]:
    """Plans a run: the oracle, then everything on features, data set by data set."""
    keeps = config.cache is not None  # else digests are not needed, and take no time
    prints = {name: fingerprint(backbone) for name, backbone in backbones.items() if keeps}
    common = {key: value for key, value in asdict(config).items() if key not in IRRELEVANT}
    for train, every in data:
        val = every.spread(config.val_images)
        where = f"on {val.name}, {len(val)} images"
        _check_truth(train, val, config)
        if keeps:
            common |= {"train": _digest(train), "val": _digest(val)}
        for stride in config.strides if "oracle" in config.protocols else ():
            yield Stage(
                f"oracle {where}, stride {stride}",
                {**common, "oracle": stride, "reductions": config.reductions},
                partial(measure_oracle, val, stride=stride, reductions=config.reductions),
                val.block,
            )
        for name, backbone in backbones.items():
            bench = Bench(name, backbone, train, val, config)
            for protocol, run in ON_FEATURES.items():
                if protocol in config.protocols:
                    settings = {**common, protocol: name, "backbone": prints.get(name)}
                    yield Stage(
                        f"{protocol} {where}, {name}",
                        None if protocol == "cost" else settings,
                        partial(run, bench),
                        val.block,
                    )
    if "cam" in config.protocols:
        photos = open_photos(config)
        settings = {"cam": config.classifier}
        if keeps:
            network = open_network(config.classifier)
            settings |= {"classifier": fingerprint(network), "photos": _digest(photos)}
        title = f"class activation maps of {config.classifier}"
        yield Stage(title, settings, partial(measure_cam, config))


def _check_truth(train: Folder, val: Folder, config: EvaluationConfig) -> None:
    """Refuses images of which nothing is known where a protocol is about to ask."""
    probes = {"preservation", "transfer"}.intersection(config.protocols)
    if probes:
        train.check_truth()
    if probes or "oracle" in config.protocols:
        val.check_truth()


def _digest(folder: Folder) -> str:
    """Digests all of a split that decides sums: its files as they are now, and how they are read.

    Intervals are drawn anew in every run, so ``block`` decides none.
    """
    content = json.dumps(asdict(replace(folder, block=1)), sort_keys=True, default=stamp)
    return hashlib.sha256(content.encode()).hexdigest()
