"""Settings of a training run and of a fit: bad values are refused at the start."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from featup_hub.training.config import FitConfig, JBUTrainingConfig

NUMBERS = [f.name for f in fields(JBUTrainingConfig) if f.type in ("int", "float")]
ENDLESS = {"max_grad_norm", "checkpoint_minutes"}


@pytest.mark.parametrize("name", sorted({*NUMBERS} - {"parts", "seed"}))
def test_a_number_below_its_range_or_no_number_is_refused_by_its_name(name):
    for value in (-0.1, math.nan, *(() if name in ENDLESS else (math.inf,))):
        with pytest.raises(ValueError, match=f"^{name} must be .*; got {value}$"):
            JBUTrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("config", "name", "value", "allowed"),
    [
        *((JBUTrainingConfig, name, 0, "at least 1") for name in ("steps", "views", "max_zoom")),
        *((JBUTrainingConfig, n, 2, "from 0 to 1") for n in ("ema", "dropout", "min_scale")),
        (JBUTrainingConfig, "downsampler", "mean", "'attention' or 'simple'"),
        *((FitConfig, n, 0, "at least 1") for n in ("views", "held_out", "max_zoom", "batch")),
        *((FitConfig, n, math.inf, "a finite number") for n in ("views", "max_pad", "lr")),
        (FitConfig, "max_pad", -1, "at least 0"),
        (FitConfig, "method", "gd", "'least-squares' or 'network'"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_range(config, name, value, allowed):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        config(**{name: value})
    assert str(refusal.value) == f"{name} must be {allowed}; got {value!r}"


def test_the_ends_of_the_ranges_are_allowed():
    ends = dict.fromkeys(("ema", "region_field", "dropout", "min_scale"), 1)
    assert JBUTrainingConfig(**ends, **dict.fromkeys(("warmup", "max_pad", "lr", "final_lr"), 0))
    assert JBUTrainingConfig(**dict.fromkeys(ENDLESS, math.inf), ema=0, steps=1)
