"""The smoke run: all protocols on scenes with known right answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from PIL import Image

from featup_hub.evaluation import run
from featup_hub.evaluation.candidates import candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.features import Source
from featup_hub.evaluation.report import rows
from featup_hub.evaluation.run import evaluate, measure
from tests.evaluation.conftest import MeanColour


def colours():
    return Source(name="mean colour", backbone=MeanColour(), identity="mean colours")


def measured(splits, *names, progress=lambda _: None, **options):
    """Measures upsamplers on the scenes' mean colours."""
    config = EvaluationConfig(strides=(16,), **options)
    candidates = [candidate(name) for name in names or ("nearest",)]
    return list(measure([tuple(splits)], [colours()], candidates, config, progress=progress))


def score(scored, upsampler, metric, stage):
    (row,) = (
        r for r in scored if (r.upsampler, r.metric, r.protocol) == (upsampler, metric, stage)
    )
    return row


@pytest.fixture(scope="module")
def oracle(scenes):
    config = EvaluationConfig(
        data=(f"folder:{scenes}",),
        upsamplers=("nearest", "bilinear", "joint_bilateral"),
        protocols=("oracle",),
        strides=(16,),
        versus=("bilinear",),
        resamples=50,
    )
    return list(chain.from_iterable(evaluate(config)))


def test_the_point_oracle_of_bilinear_is_wrong_on_exactly_half_the_strip(oracle):
    # Cells are sampled at columns 8 and 24, so bilinear puts the edge midway, at 16: of the
    # strip's columns 16..23 the four before the true edge at 20 are wrong.
    found = {
        m: score(oracle, "bilinear", m, "point oracle").score.value for m in ("mIoU", "accuracy")
    }
    assert score(oracle, "bilinear", "boundary accuracy", "point oracle").score.value == 0.5
    assert found["accuracy"] == 44 / 48
    assert found["mIoU"] == pytest.approx((16 / 20 + 28 / 32) / 2)


def test_an_upsampler_that_follows_the_image_is_right_everywhere(oracle):
    for metric in ("boundary accuracy", "mIoU", "accuracy"):
        assert score(oracle, "joint_bilateral", metric, "point oracle").score.value == 1
    best = score(oracle, "joint_bilateral", "boundary accuracy", "point oracle")
    assert best.versus["bilinear"].value == 0.5
    assert best.versus["bilinear"].significant


def test_the_depth_oracle_of_nearest_is_wrong_by_two_metres_on_four_columns(oracle):
    found = score(oracle, "nearest", "RMSE", "point oracle").score
    assert found.value == pytest.approx((4 / 48 * 2**2) ** 0.5)
    edge = score(oracle, "nearest", "edge RMSE", "point oracle").score
    assert edge.value == pytest.approx((4 / 8 * 2**2) ** 0.5)


def test_area_averages_carry_the_edge_that_points_lose(oracle):
    # The cell over the edge is 3/4 bright, so bilinear finds the edge between 16 and 20.
    point, area = (
        score(oracle, "bilinear", "boundary accuracy", f"{way} oracle").score.value
        for way in ("point", "area")
    )
    assert area > point


def test_a_frozen_probe_reads_labels_and_depth_off_upsampled_features(splits, tmp_path):
    found = measured(
        splits, "nearest", "joint_bilateral", protocols=("preservation",), cache=tmp_path
    )
    one, two = (rows(found, resamples=50, seed=seed) for seed in (1, 2))
    assert one == rows(found, resamples=50, seed=1) != two
    found = rows(found, resamples=50)
    labels = score(found, "nearest", "accuracy", "frozen probe")
    assert labels.score.value == 44 / 48  # the mixed cell is mostly bright
    assert (labels.backbone, labels.images) == ("mean colour /16", 3)
    blurred = score(found, "nearest", "edge RMSE", "frozen probe").score.value
    sharp = score(found, "joint_bilateral", "edge RMSE", "frozen probe").score.value
    assert sharp < blurred


def test_every_protocol_on_features_leaves_its_scores(splits, tmp_path):
    options = {"probe_steps": 200, "pixels": 64, "cost_images": 2, "cache": tmp_path}
    protocols = ("transfer", "consistency", "cost")
    found = measured(splits, "nearest", "joint_bilateral", protocols=protocols, **options)
    found = rows(found, resamples=20)
    assert {row.protocol for row in found} == {"transfer probe", "consistency", "cost"}
    # A probe of sharp features finds the edge that features repeated by cells cannot show.
    assert score(found, "joint_bilateral", "accuracy", "transfer probe").score.value == 1
    assert score(found, "nearest", "accuracy", "transfer probe").score.value < 1
    assert score(found, "nearest", "seconds", "cost").score.value > 0
    assert score(found, "nearest", "view error", "consistency").images == 3


def test_a_run_tells_every_step_and_leaves_the_global_generator_alone(splits):
    state, lines = torch.get_rng_state(), []
    options = {"probe_steps": 2, "val_images": 2, "progress": lines.append}
    measured(splits, protocols=("oracle", "preservation"), **options)
    assert torch.equal(state, torch.get_rng_state())
    assert [line.split()[0] for line in lines] == ["oracle", "preservation"]
    assert all("/val, 2 images" in line for line in lines)


def test_frames_of_a_clip_are_drawn_in_blocks_from_the_cache_too(splits, tmp_path):
    train, val = splits
    options = {"reductions": ("point",), "probe_steps": 5, "cost_images": 1, "cache": tmp_path}
    protocols = ("oracle", "preservation", "cost")  # which takes two images of the three
    for _ in range(2):
        found = measured((train, replace(val, block=3)), protocols=protocols, **options)
        assert [each.block for each in found] == [3, 3, 2]


@pytest.mark.parametrize(
    ("protocol", "unknown"),
    [("oracle", (1,)), ("preservation", (0,)), ("preservation", (1,)), ("transfer", (0,))],
)
def test_missing_truth_is_an_error_before_anything_is_measured(splits, protocol, unknown):
    lines, splits = [], list(splits)
    for index in unknown:
        splits[index] = replace(splits[index], labels=(), depth=())
    with pytest.raises(ValueError, match=r"labels or depth are needed beside the images of scenes"):
        measured(splits, protocols=("oracle", protocol), progress=lines.append)
    assert lines == []


@pytest.mark.parametrize("protocol", ["preservation", "transfer", "consistency"])
def test_fitting_on_images_that_are_scored_is_refused_before_anything_is_measured(splits, protocol):
    lines, (_, val) = [], splits
    same = (replace(val, name="scenes/train"), val)  # as of a layout without splits
    message = rf"^data must .* for {protocol}; scenes/train and scenes\d+/val share files"
    with pytest.raises(ValueError, match=message):
        measured(same, protocols=("oracle", protocol), progress=lines.append)
    assert lines == []
    measured(same, protocols=("oracle", "cost"))


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ("efficientnet_lit0", "did you mean 'efficientnet_lite0'"),
        ("efficientnet_lite0=none.pth", "no weights file none.pth"),
        ("no_such_module:x", "must be importable"),
        ("efficientnet_lite0", "must each have a name of its own; got efficientnet_lite0, eff"),
    ],
)
def test_every_backbone_s_name_and_file_are_checked_before_one_is_loaded(
    scenes, monkeypatch, later, message
):
    monkeypatch.setattr(
        "featup_hub.evaluation.features.load_backbone", lambda *_, **__: pytest.fail("loaded")
    )
    config = EvaluationConfig(data=(f"folder:{scenes}",), backbones=("efficientnet_lite0", later))
    with pytest.raises(ValueError, match=f"^backbones:? .*{message}"):
        evaluate(config)


def test_missing_photographs_are_an_error_before_a_model_is_loaded(scenes, splits, monkeypatch):
    monkeypatch.setattr(run, "find_source", None)
    monkeypatch.setattr(run, "open_classifier", None)
    protocols, data = ("preservation", "cam"), (f"folder:{scenes}",)
    with pytest.raises(ValueError, match="photos must be given"):
        evaluate(EvaluationConfig(data=data, protocols=protocols))
    with pytest.raises(ValueError, match="photos must be given"):
        measured(splits, protocols=protocols)


@pytest.mark.parametrize("depth", [False, True])
def test_an_image_that_is_all_void_counts_for_nothing(splits, tmp_path, depth):
    train, val = splits
    if not depth:
        val = replace(val, depth=())
    Image.new("L", (48, 32), 255).save(tmp_path / "void.png")
    with_void = replace(val, labels=(*val.labels[:-1], tmp_path / "void.png"))
    found = [
        measured((train, each), protocols=("oracle",))[0].sums["nearest"]
        for each in (val, with_void)
    ]
    known, void = (sums["confusion"] for sums in found)
    assert [len(known), len(void)] == [3, 3]
    assert [int(known[-1].sum()), int(void[-1].sum())] == [32 * 48, 0]
    assert torch.equal(known[:-1], void[:-1])
    assert int(found[1]["band"][-1].sum()) == 0
    if depth:  # which is known where labels are void
        assert torch.equal(found[0]["depth"][-1], found[1]["depth"][-1])


def test_every_number_of_looks_is_a_row_where_a_backbone_looks_and_an_upsampler_is_opened_once(
    scenes, monkeypatch, tmp_path
):
    opened = []
    monkeypatch.setattr(run, "find_source", lambda _: ("colours", colours))
    monkeypatch.setattr(run, "candidate", lambda spec: (opened.append(spec), candidate(spec))[1])
    config = EvaluationConfig(
        data=(f"folder:{scenes}",),
        upsamplers=("nearest",),
        protocols=("oracle", "preservation"),
        strides=(16,),
        reductions=("point",),
        looks=(1, 16),
        versus=("nearest",),
        cache=tmp_path,
        resamples=20,
    )
    for labels, found in (evaluate(config), evaluate(config)):  # the second time from the cache
        assert {row.upsampler for row in labels} == {"nearest"}
        assert score(found, "nearest", "accuracy", "frozen probe").score.value == 44 / 48
        # Sixteen looks tell the place of the edge to 4 px, where it lies.
        assert score(found, "nearest ×16", "accuracy", "frozen probe").score.value > 46 / 48
    assert opened == ["nearest", "nearest"]
