"""The smoke run: all protocols on scenes with known right answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from PIL import Image

from featup_hub.backbones import Backbone
from featup_hub.evaluation.candidates import candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.features import Source
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.report import rows
from featup_hub.evaluation.run import evaluate, measure


class MeanColour(Backbone):
    """Features whose right answer is known: the mean colour of every 16-px cell."""

    def __init__(self):
        super().__init__(feat_dim=3, patch_size=16)

    def features(self, image):
        return torch.nn.functional.avg_pool2d(image, 16)


def colours(name="x"):
    return Source(name=name, backbone=MeanColour(), identity="mean colours")


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
    found = score(oracle, "bilinear", "boundary accuracy", "point oracle")
    assert found.score.value == 0.5
    assert score(oracle, "bilinear", "accuracy", "point oracle").score.value == 44 / 48
    assert score(oracle, "bilinear", "mIoU", "point oracle").score.value == pytest.approx(
        (16 / 20 + 28 / 32) / 2
    )


def test_an_upsampler_that_follows_the_image_is_right_everywhere(oracle):
    for metric in ("boundary accuracy", "mIoU", "accuracy"):
        assert score(oracle, "joint_bilateral", metric, "point oracle").score.value == 1


def test_a_paired_difference_from_bilinear_is_half_the_strip_and_significant(oracle):
    difference = score(oracle, "joint_bilateral", "boundary accuracy", "point oracle").versus[
        "bilinear"
    ]
    assert difference.value == 0.5
    assert difference.significant


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


def test_a_frozen_probe_reads_labels_and_depth_off_upsampled_features(scenes, tmp_path):
    config = EvaluationConfig(data=(), cache=tmp_path, protocols=("preservation",), resamples=50)
    splits = [tuple(open_data(f"folder:{scenes}", split) for split in ("train", "val"))]
    candidates = [candidate(name) for name in ("nearest", "joint_bilateral")]
    found = rows(measure(splits, [colours("mean colour")], candidates, config), resamples=50)
    labels = score(found, "nearest", "accuracy", "frozen probe")
    assert labels.score.value == 44 / 48  # the mixed cell is mostly bright
    assert labels.backbone == "mean colour /16"
    assert labels.images == 3
    blurred = score(found, "nearest", "edge RMSE", "frozen probe").score.value
    sharp = score(found, "joint_bilateral", "edge RMSE", "frozen probe").score.value
    assert sharp < blurred


def test_cached_features_are_computed_once(scenes, tmp_path):
    class Counting(MeanColour):
        calls = 0

        def features(self, image):
            Counting.calls += 1
            return super().features(image)

    splits = [tuple(open_data(f"folder:{scenes}", split) for split in ("train", "val"))]
    config = EvaluationConfig(data=(), cache=tmp_path, protocols=("preservation",), probe_steps=5)
    for name in ("nearest", "bilinear"):
        list(
            measure(
                splits,
                [Source(name="x", backbone=Counting(), identity="x")],
                [candidate(name)],
                config,
            )
        )
    assert Counting.calls == 7


def test_upsamplers_of_one_name_are_refused(scenes):
    config = EvaluationConfig(
        data=(f"folder:{scenes}",), upsamplers=("bilinear", "bilinear"), protocols=("oracle",)
    )
    with pytest.raises(ValueError, match=r"name of its own.*write NAME=FILE"):
        list(evaluate(config))


def test_progress_names_every_step(scenes):
    lines = []
    config = EvaluationConfig(
        data=(f"folder:{scenes}",),
        upsamplers=("bilinear",),
        protocols=("oracle",),
        strides=(16,),
        val_images=2,
        resamples=2,
    )
    list(evaluate(config, progress=lines.append))
    assert len(lines) == 1
    assert "/val, 2 images" in lines[0]


def test_a_run_leaves_the_global_generator_alone(scenes):
    state = torch.get_rng_state()
    config = EvaluationConfig(data=(), protocols=("preservation",), probe_steps=2)
    splits = [tuple(open_data(f"folder:{scenes}", split) for split in ("train", "val"))]
    list(measure(splits, [colours()], [candidate("bilinear")], config))
    assert torch.equal(state, torch.get_rng_state())


def test_every_protocol_on_features_leaves_its_scores(scenes, tmp_path):
    config = EvaluationConfig(
        protocols=("transfer", "consistency", "cost"),
        cache=tmp_path,
        probe_steps=200,
        pixels=64,
        cost_images=2,
    )
    splits = [tuple(open_data(f"folder:{scenes}", split) for split in ("train", "val"))]
    candidates = [candidate(name) for name in ("nearest", "joint_bilateral")]
    found = rows(measure(splits, [colours()], candidates, config), resamples=20)
    assert {row.protocol for row in found} == {"transfer probe", "consistency", "cost"}
    # A probe of sharp features finds the edge that features repeated by cells cannot show.
    assert score(found, "joint_bilateral", "accuracy", "transfer probe").score.value == 1
    assert score(found, "nearest", "accuracy", "transfer probe").score.value < 1
    assert score(found, "nearest", "seconds", "cost").score.value > 0
    assert score(found, "nearest", "view error", "consistency").images == 3


def test_protocols_without_their_data_are_refused():
    with pytest.raises(ValueError, match=r"data must be given, .* for oracle; got none"):
        list(evaluate(EvaluationConfig(protocols=("oracle",))))


def test_frames_of_a_clip_are_drawn_in_blocks_from_the_cache_too(scenes, tmp_path):
    train, val = (open_data(f"folder:{scenes}", split) for split in ("train", "val"))
    data = [(train, replace(val, block=3))]
    config = EvaluationConfig(
        protocols=("oracle", "preservation"),
        strides=(16,),
        reductions=("point",),
        probe_steps=5,
        cache=tmp_path,
    )
    nearest = [candidate("nearest")]
    for _ in range(2):
        found = list(measure(data, [colours()], nearest, config))
        assert [each.block for each in found] == [3, 3]
    for row in rows(found, versus=()):
        # A block of all three images on a circle is the set itself, in any order.
        assert row.score.low == row.score.high == pytest.approx(row.score.value)


@pytest.mark.parametrize("stage", ["oracle", "preservation", "transfer"])
def test_images_without_labels_and_depth_are_refused(scenes, stage):
    splits = [
        replace(open_data(f"folder:{scenes}", s), labels=(), depth=()) for s in ("train", "val")
    ]
    config = EvaluationConfig(protocols=(stage,), strides=(16,))
    with pytest.raises(ValueError, match=r"labels or depth are needed beside the images of scenes"):
        list(measure([tuple(splits)], [colours()], [candidate("nearest")], config))


def test_missing_truth_is_an_error_before_anything_is_measured(scenes):
    lines, splits = [], [open_data(f"folder:{scenes}", split) for split in ("train", "val")]
    unknown = [replace(split, labels=(), depth=()) for split in splits]
    config = EvaluationConfig(protocols=("preservation",))
    for missing in ((splits[0], unknown[1]), (unknown[0], splits[1])):
        with pytest.raises(ValueError, match="labels or depth are needed"):
            list(
                measure(
                    [tuple(splits), missing],
                    [colours()],
                    [candidate("nearest")],
                    config,
                    progress=lines.append,
                )
            )
    assert lines == []


@pytest.mark.parametrize("depth", [False, True])
def test_an_image_that_is_all_void_counts_for_nothing(scenes, tmp_path, depth):
    train, val = (open_data(f"folder:{scenes}", split) for split in ("train", "val"))
    if not depth:
        val = replace(val, depth=())
    Image.new("L", (48, 32), 255).save(tmp_path / "void.png")
    with_void = replace(val, labels=(*val.labels[:-1], tmp_path / "void.png"))
    config = EvaluationConfig(protocols=("oracle",), strides=(16,))
    found = [
        next(measure([(train, each)], [], [candidate("nearest")], config)).sums["nearest"]
        for each in (val, with_void)
    ]
    known, void = (torch.stack(sums["confusion"]) for sums in found)
    assert [len(known), len(void)] == [3, 3]
    assert [int(known[-1].sum()), int(void[-1].sum())] == [32 * 48, 0]
    assert torch.equal(known[:-1], void[:-1])
    assert int(found[1]["band"][-1].sum()) == 0
    if depth:  # which is known where labels are void
        assert torch.equal(found[0]["depth"][-1], found[1]["depth"][-1])


def test_missing_photographs_are_an_error_before_anything_is_measured(scenes, tmp_path):
    lines = []
    data = (f"folder:{scenes}",)
    config = EvaluationConfig(data=data, protocols=("oracle", "cam"), photos=tmp_path)
    with pytest.raises(ValueError, match=r"need photographs; .* has none"):
        list(evaluate(config, progress=lines.append))
    assert lines == []


def test_every_number_of_looks_is_a_row_of_its_own(scenes, monkeypatch):
    monkeypatch.setattr("featup_hub.evaluation.run.open_source", lambda _: colours())
    config = EvaluationConfig(
        data=(f"folder:{scenes}",),
        upsamplers=("nearest",),
        protocols=("preservation",),
        looks=(1, 16),
        versus=("nearest",),
        resamples=20,
    )
    (found,) = evaluate(config)
    assert score(found, "nearest", "accuracy", "frozen probe").score.value == 44 / 48
    # Sixteen looks tell the place of the edge to 4 px, where it lies.
    assert score(found, "nearest ×16", "accuracy", "frozen probe").score.value > 46 / 48


def test_an_upsampler_is_opened_once(scenes, monkeypatch):
    from featup_hub.evaluation import run

    opened = []

    def recorded(spec):
        opened.append(spec)
        return candidate(spec)

    monkeypatch.setattr(run, "candidate", recorded)
    config = EvaluationConfig(
        data=(f"folder:{scenes}",), upsamplers=("nearest",), protocols=("oracle",), strides=(16,)
    )
    list(evaluate(config))
    assert opened == ["nearest"]
