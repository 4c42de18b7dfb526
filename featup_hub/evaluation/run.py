"""Runs all protocols for all upsamplers on the same images and features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

from torch import Tensor

from featup_hub.evaluation.cam import measure_cam, open_classifier, open_photos
from featup_hub.evaluation.candidates import Candidate, UnknownUpsamplerError, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.consistency import measure_consistency
from featup_hub.evaluation.cost import measure_cost
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.features import Bench, Source, file_stamp, find_source, with_looks
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.oracle import measure_oracle
from featup_hub.evaluation.probes import measure_preservation, measure_transfer
from featup_hub.evaluation.propagation import measure_propagation
from featup_hub.evaluation.report import Row, rows
from featup_hub.evaluation.sums import Measurement, Results, measure_new
from featup_hub.loading import find_card

ON_FEATURES = {
    "preservation": measure_preservation,
    "transfer": measure_transfer,
    "consistency": measure_consistency,
    "propagation": measure_propagation,
    "cost": measure_cost,
}
FITTED = {"preservation", "transfer", "consistency"}
"""Protocols that fit something on training images."""
SETTINGS = (
    *("train_images", "transfer_images", "val_images"),
    *("max_side", "probe_steps", "pixels", "seed"),
)
"""Fields of the configuration that sums depend on."""


class Stage(NamedTuple):
    """Protocols on a data set and a backbone; the last three fields as in measure_new."""

    title: str
    data: Dataset
    backbone: str
    run: Callable[[Sequence[Candidate]], Results]
    candidates: Sequence[Candidate]
    settings: dict[str, object] | None


def evaluate(
    config: EvaluationConfig, *, progress: Callable[[str], None] = lambda _: None
) -> Iterator[list[Row]]:
    """Measures and scores upsamplers side by side.

    The call opens and checks everything; the returned iterator measures.

    ``progress`` is called with one line of text at every step.

    Returns:
        Lists of rows, one list per protocol, data set and backbone or stride; one row per score and
        upsampler.

    Raises:
        ValueError: If a name does not exist, or data that a protocol needs is missing. A message
            about a field begins with its name.
    """
    with _about("upsamplers", UnknownUpsamplerError):
        opened = [candidate(spec) for spec in config.upsamplers]
    candidates = [each.with_looks(looks) for each in opened for looks in config.looks]
    _check(config, [each.name for each in candidates])
    open_split = partial(open_data, max_side=config.max_side)
    # Other protocols fit nothing, so the data need no training images.
    first: Literal["train", "val"] = "train" if FITTED & set(config.protocols) else "val"
    data = [(open_split(spec, first), open_split(spec, "val")) for spec in config.data]
    _check_names("data", [val.name for _, val in data], "measure them in separate runs")
    specs = config.backbones if ON_FEATURES.keys() & set(config.protocols) else ()
    with _about("backbones", ValueError, FileNotFoundError):
        found = [find_source(spec) for spec in specs]  # before the first is loaded
    _check_names("backbones", [name for name, _ in found], "rename a file or a callable")
    with _about("backbones", ValueError, FileNotFoundError):
        sources = [load() for _, load in found]
    for source, looks in product(sources, config.looks):
        with_looks(source.backbone, looks)  # refuses looks that do not fit, before any work
    measured = measure(data, sources, candidates, config, progress=progress)
    options = {"resamples": config.resamples, "seed": config.seed}
    return (rows([each], versus=config.versus, **options) for each in measured)


def measure(
    data: Sequence[tuple[Dataset, Dataset]],
    sources: Sequence[Source],
    candidates: Sequence[Candidate],
    config: EvaluationConfig,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Measurement]:
    """Measures opened upsamplers: yields one measurement per protocol, data and backbone or stride.

    ``data`` holds the training and validation split of each data set. The config's own ``data``,
    ``upsamplers`` and ``backbones`` are not read.

    Raises:
        ValueError: If data that a protocol needs is missing, before anything is measured.
    """
    stages = list(_stages(data, sources, candidates, config))

    def measured() -> Iterator[Measurement]:
        for title, data, backbone, run, chosen, settings in stages:
            progress(title)
            for protocol, sums in measure_new(run, chosen, settings, config.cache).items():
                _warn_of_one_class(data, sums)
                yield Measurement(protocol, data.name, backbone, data.block, sums)

    return measured()


def _warn_of_one_class(data: Dataset, sums: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Warns of labels without two classes, such as masks of 0 and 255: scores mean little."""
    counts = next(iter(sums.values()), {}).get("confusion")
    if counts is None or len(present := counts.sum((0, 2)).nonzero().flatten().tolist()) > 1:
        return
    warnings.warn(
        "labels of two classes or more are needed for scores that mean something; the pixels "
        f"scored in {data.name} have {f'class {present[0]} only' if present else 'none'}; values "
        f"outside 0 to {data.classes - 1} are void: store a mask of 0 and 255 as 0 and 1",
        stacklevel=2,
    )


def _stages(
    data: Sequence[tuple[Dataset, Dataset]],
    sources: Sequence[Source],
    candidates: Sequence[Candidate],
    config: EvaluationConfig,
) -> Iterator[Stage]:
    """Plans a run: the oracle, then the protocols on features, data set by data set."""
    wanted = set(config.protocols)
    one_look = [each for each in candidates if each.looks == 1]
    for name in ("oracle", "cam"):
        if name in wanted and not one_look:
            got = ", ".join(map(str, config.looks))
            raise ValueError(
                f"looks must include 1 for {name}, which takes features of one look; got {got}"
            )
    for train, every in data:
        if wanted & {"oracle", "preservation", "transfer", "propagation"}:
            every.check_truth()
        if "propagation" in wanted:
            every.videos()
        fitted = sorted(wanted & FITTED)
        if fitted and set(train.images) & set(every.images):
            raise ValueError(
                f"data must have images to fit on that are not scored, for {', '.join(fitted)}; "
                f"{train.name} and {every.name} share files; measure only oracle, propagation or "
                "cost"
            )
        if wanted & {"preservation", "transfer"}:
            train.check_truth()
        val = every.spread(config.val_images)
        where = f"on {val.name}, {len(val)} images"
        common: dict[str, object] = {name: getattr(config, name) for name in SETTINGS}
        common |= {"train": _stamp(train), "val": _stamp(every)}
        for stride in config.strides if "oracle" in wanted else ():
            run = partial(measure_oracle, val, stride=stride, reductions=config.reductions)
            settings = {**common, "oracle": stride, "reductions": config.reductions}
            title = f"oracle {where}, stride {stride}"
            yield Stage(title, val, f"stride {stride}", run, one_look, settings)
        for source in sources:
            for protocol in (name for name in ON_FEATURES if name in wanted):
                few = val.spread(config.cost_images + 1)
                scored = {"propagation": every, "cost": few}.get(protocol, val)
                bench = Bench(source=source, train=train, val=scored, config=config)
                kept = source.identity is not None and protocol != "cost"
                yield Stage(
                    f"{protocol} {where}, {source.name}",
                    scored,
                    f"{source.name} /{bench.stride}",
                    partial(ON_FEATURES[protocol], bench),
                    candidates,
                    {**common, protocol: source.name, "source": source.identity} if kept else None,
                )
    if "cam" in wanted:
        photos = open_photos(config)
        with _about("classifier", ValueError):
            classifier = open_classifier(config.classifier)
        run = partial(measure_cam, photos, classifier)
        settings = {"cam": str(find_card(config.classifier)), "photos": _stamp(photos)}
        title = f"class activation maps of {config.classifier}"
        yield Stage(title, photos, config.classifier, run, one_look, settings)


def _stamp(dataset: Dataset) -> dict[str, object]:
    """Returns all that a split's sums depend on: its files, and how they are read."""
    return {
        key: list(map(file_stamp, value)) if key in ("images", "labels", "depth") else value
        for key, value in vars(dataset).items()
    }


def _check(config: EvaluationConfig, names: Sequence[str]) -> None:
    """Checks that there are data and photographs, and the names of upsamplers and references.

    The default's references may be missing.
    """
    on_data = [name for name in config.protocols if name != "cam"]
    if on_data and not config.data:
        raise ValueError(
            f"data must be given, as LAYOUT:FOLDER, for {', '.join(on_data)}; got none"
        )
    if "cam" in config.protocols:
        open_photos(config)
        with _about("classifier", ValueError):  # its weights are loaded later
            find_card(config.classifier)
    _check_names("upsamplers", names, "write NAME=FILE")
    if config.versus != EvaluationConfig.versus and not set(config.versus) <= set(names):
        raise ValueError(
            f"versus must name upsamplers that take part, {', '.join(names)}; "
            f"got {', '.join(config.versus)}"
        )


def _check_names(field: str, names: Sequence[str], hint: str) -> None:
    """Raises ValueError if two have the same name in tables."""
    if len(set(names)) < len(names):
        raise ValueError(
            f"{field} must each have a name of its own; got {', '.join(names)}; {hint}"
        )


@contextmanager
def _about(field: str, *errors: type[Exception]) -> Iterator[None]:
    """Puts a field's name in front of its error."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{field}: {error}") from error
