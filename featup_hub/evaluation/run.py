"""Runs all protocols for all upsamplers on the same images and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from featup_hub.evaluation.cam import measure_cam, open_classifier, open_photos
from featup_hub.evaluation.candidates import Candidate, UnknownUpsamplerError, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.consistency import measure_consistency
from featup_hub.evaluation.cost import measure_cost
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.features import Bench, Source, check_source, file_stamp, open_source
from featup_hub.evaluation.layouts import layout_and_root, open_data
from featup_hub.evaluation.oracle import measure_oracle
from featup_hub.evaluation.probe_protocols import measure_preservation, measure_transfer
from featup_hub.evaluation.propagation import measure_propagation
from featup_hub.evaluation.report import Row, rows
from featup_hub.evaluation.sums import Measurement, measure_new

__all__ = ["evaluate", "measure"]

ON_FEATURES = {
    "preservation": measure_preservation,
    "transfer": measure_transfer,
    "consistency": measure_consistency,
    "propagation": measure_propagation,
    "cost": measure_cost,
}
NEEDS_TRUTH = {"oracle", "preservation", "transfer", "propagation"}
NOT_SETTINGS = {
    *("data", "upsamplers", "backbones", "protocols", "versus", "cache", "resamples", "looks"),
    *("strides", "reductions", "cost_images", "photos", "photo_images", "classifier"),
}
"""Fields that do not change the sums, or that stages list in their own settings."""


class Stage(NamedTuple):
    """One protocol on one data set and backbone; ``settings`` as in measure_new."""

    title: str
    run: Callable[[Sequence[Candidate]], Sequence[Measurement]]
    settings: dict[str, object] | None


def evaluate(
    config: EvaluationConfig, *, progress: Callable[[str], None] = lambda _: None
) -> Iterator[list[Row]]:
    """Measures and scores upsamplers side by side.

    The call opens and checks everything; the returned iterator measures.

    Args:
        config: What to measure.
        progress: Called with one line of text at every step.

    Returns:
        Lists of rows, one list per protocol, data set and backbone or stride; one row per score and
        upsampler.

    Raises:
        ValueError: If a name does not exist, or data that a protocol needs is missing. A message
            about a field begins with its name.
    """
    candidates = [
        each.with_looks(looks)
        for each in map(_candidate, config.upsamplers)
        for looks in config.looks
    ]
    _check_names(config, [each.name for each in candidates])
    _check(config)
    sources = list(map(open_source, config.backbones)) if _needs_features(config) else []
    splits = [
        (
            open_data(spec, "train", max_side=config.max_side),
            open_data(spec, "val", max_side=config.max_side),
        )
        for spec in config.data
    ]
    measured = measure(splits, sources, candidates, config, progress=progress)
    return (rows([found], versus=config.versus, resamples=config.resamples) for found in measured)


def measure(
    data: Sequence[tuple[Dataset, Dataset]],
    sources: Sequence[Source],
    candidates: Sequence[Candidate],
    config: EvaluationConfig,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Measurement]:
    """Measures loaded upsamplers.

    Args:
        data: Training and validation split of each data set.
        sources: Backbones.
        candidates: Upsamplers.
        config: What to measure; its ``data``, ``upsamplers`` and ``backbones`` are not read.
        progress: Called with one line of text at every step.

    Returns:
        One measurement per protocol, data set and backbone or stride.

    Raises:
        ValueError: If data that a protocol needs is missing, before anything is measured.
    """
    stages = list(_stages(data, sources, config))

    def run() -> Iterator[Measurement]:
        for stage in stages:
            progress(stage.title)
            yield from measure_new(stage.run, candidates, stage.settings, config.cache)

    return run()


def _stages(
    data: Sequence[tuple[Dataset, Dataset]], sources: Sequence[Source], config: EvaluationConfig
) -> Iterator[Stage]:
    """Plans a run: the oracle, then the protocols on features, data set by data set."""
    fields = {key: value for key, value in asdict(config).items() if key not in NOT_SETTINGS}
    for train, every in data:
        if NEEDS_TRUTH.intersection(config.protocols):
            every.check_truth()
        if {"preservation", "transfer"}.intersection(config.protocols):
            train.check_truth()
        val = every.spread(config.val_images)
        where = f"on {val.name}, {len(val)} images"
        common = {**fields, "train": _stamp(train), "val": _stamp(every)}
        for stride in config.strides if "oracle" in config.protocols else ():
            yield Stage(
                title=f"oracle {where}, stride {stride}",
                run=partial(measure_oracle, val, stride=stride, reductions=config.reductions),
                settings={**common, "oracle": stride, "reductions": config.reductions},
            )
        for source in sources:
            for protocol, run in ON_FEATURES.items():
                scored = every if protocol == "propagation" else val
                bench = Bench(source=source, train=train, val=scored, config=config)
                if protocol in config.protocols:
                    kept = source.identity is not None and protocol != "cost"
                    yield Stage(
                        title=f"{protocol} {where}, {source.name}",
                        run=partial(run, bench),
                        settings={**common, protocol: source.name, "source": source.identity}
                        if kept
                        else None,
                    )
    if "cam" in config.protocols:
        with _about("classifier"):
            classifier = open_classifier(config.classifier)
        photos = open_photos(config)
        yield Stage(
            title=f"class activation maps of {config.classifier}",
            run=partial(measure_cam, config, classifier),
            settings={"cam": config.classifier, "photos": _stamp(photos)},
        )


def _candidate(spec: str) -> Candidate:
    """Opens an upsampler; errors in its name or signature name the field."""
    with _about("upsamplers", (UnknownUpsamplerError, TypeError)):
        return candidate(spec)


def _stamp(dataset: Dataset) -> dict[str, object]:
    """Returns all that a split's sums depend on: its files, and how they are read."""
    return {
        key: list(map(file_stamp, value)) if key in ("images", "labels", "depth") else value
        for key, value in vars(dataset).items()
    }


def _needs_features(config: EvaluationConfig) -> bool:
    return any(name in ON_FEATURES for name in config.protocols)


def _check(config: EvaluationConfig) -> None:
    """Checks the names before anything is loaded."""
    on_data = [name for name in config.protocols if name != "cam"]
    if on_data and not config.data:
        raise ValueError(
            f"data must be given, as LAYOUT:FOLDER, for {', '.join(on_data)}; got none"
        )
    for spec in config.data:
        layout_and_root(spec)
    for spec in config.backbones if _needs_features(config) else ():
        with _about("backbones"):
            check_source(spec)
    if "cam" in config.protocols and config.photos is None:
        raise ValueError("photos must be given, a folder of photographs, for cam; got none")


def _check_names(config: EvaluationConfig, names: Sequence[str]) -> None:
    """Checks that upsamplers have different names, and that references are among them.

    The default's references may be missing.
    """
    if len(set(names)) < len(names):
        raise ValueError(
            f"upsamplers must each have a name of its own; got {', '.join(names)}; write NAME=FILE"
        )
    if config.versus != EvaluationConfig.versus and not set(config.versus) <= set(names):
        raise ValueError(
            f"versus must name upsamplers that take part, {', '.join(names)}; "
            f"got {', '.join(config.versus)}"
        )


@contextmanager
def _about(field: str, errors: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Puts a field's name in front of its error."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{field}: {error}") from error
