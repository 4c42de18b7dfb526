"""Settings of a training run: bad values are refused at the start."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from featup_hub.training.config import JBUTrainingConfig

COUNTS = ("steps", "batch", "image_size", "views", "projection_dim", "crf_samples")
FLOATS = [field.name for field in fields(JBUTrainingConfig) if field.type == "float"]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *((name, 0, "at least 1") for name in (*COUNTS, "region_channels")),
        *((name, 0.5, "at least 1") for name in ("max_aspect", "max_stride", "max_zoom")),
        *((name, -1, "at least 0") for name in ("max_pad", "warmup", "checkpoint_minutes")),
        *((name, -0.1, "at least 0") for name in ("crf_weight", "tv_weight", "region_weight")),
        *((name, -0.1, "at least 0") for name in ("region_noise", "final_lr")),
        *((name, 0.0, "above 0") for name in ("lr", "max_grad_norm")),
        *(("min_scale", value, "above 0 and at most 1") for value in (0.0, -1.0, 2.0)),
        *((name, value, "from 0 to 1") for name in ("region_field", "ema") for value in (-1, 2)),
        *(("dropout", value, "at least 0 and below 1") for value in (-0.1, 1.0)),
        ("downsampler", "mean", "'attention' or 'simple'"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_name(name, value, allowed):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        JBUTrainingConfig(**{name: value})
    assert str(refusal.value) == f"{name} must be {allowed}; got {value!r}"


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_are_not_finite_are_refused(name):
    never = {"max_grad_norm", "checkpoint_minutes"}
    for value in (math.nan, -math.inf, *(() if name in never else (math.inf,))):
        with pytest.raises(ValueError, match=f"^{name} must be .*; got {value}"):
            JBUTrainingConfig(**{name: value})


def test_the_ends_of_the_ranges_are_allowed():
    config = JBUTrainingConfig(
        **dict.fromkeys(COUNTS, 1), min_scale=1.0, ema=1.0, region_field=1.0, warmup=0, final_lr=0.0
    )
    assert replace(config, ema=0.0, max_pad=0)
    assert replace(config, max_grad_norm=math.inf, checkpoint_minutes=math.inf)
