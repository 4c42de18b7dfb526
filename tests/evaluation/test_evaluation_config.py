"""A run that cannot give results is refused at the start."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from featup_hub.cli import main
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.run import evaluate

REFUSED = [
    ("strides", (16, 0), "must be at least 1 pixel each; got 16, 0"),
    ("strides", (-4,), "must be at least 1 pixel each; got -4"),
    *((name, 0, "must be at least 1; got 0") for name in ("resamples", "pixels", "probe_steps")),
    ("cost_images", 0, "must be at least 1; got 0"),
    *(
        (name, -5, "must be at least 0; got -5")
        for name in ("max_side", "train_images", "transfer_images", "val_images", "photo_images")
    ),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_a_number_out_of_range_is_refused_here_and_in_terms_of_the_flag(
    field, value, message, capsys
):
    with pytest.raises(ValueError, match=re.escape(f"{field} {message}")):
        EvaluationConfig(**{field: value})
    flag = f"--{field.replace('_', '-')}"
    typed = map(str, value if isinstance(value, tuple) else (value,))
    assert main(["evaluate", flag, *typed]) == 2
    assert capsys.readouterr().err == f"error: {flag} {message}\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ("oracel",)}, "protocols must be of oracle, preservation.*; got oracel"),
        ({"protocols": ()}, "protocols must be of oracle.*; got none"),
        ({"reductions": ("mean",)}, "reductions must be of point, area; got mean"),
    ],
)
def test_an_unknown_choice_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**change)


def test_zero_stands_for_all_images_and_for_any_side():
    EvaluationConfig(
        train_images=0, transfer_images=0, val_images=0, photo_images=0, max_side=0, strides=()
    )


def test_a_reference_that_does_not_take_part_is_refused(scenes, capsys):
    config = EvaluationConfig(
        data=(f"folder:{scenes}",), upsamplers=("nearest", "bilinear"), versus=("bilinaer",)
    )
    with pytest.raises(ValueError, match="take part, nearest, bilinear; got bilinaer"):
        evaluate(config)
    typed = f"evaluate --data folder:{scenes} --upsamplers nearest bilinear --versus bilinaer"
    assert main(typed.split()) == 2
    assert capsys.readouterr().err == (
        "error: --versus must name upsamplers that take part, nearest, bilinear; got bilinaer\n"
    )


def test_the_default_references_may_be_missing(scenes):
    evaluate(
        EvaluationConfig(data=(f"folder:{scenes}",), upsamplers=("nearest",), protocols=("oracle",))
    )


def test_a_reference_is_named_as_tables_call_it(scenes):
    config = EvaluationConfig(
        data=(f"folder:{scenes}",),
        upsamplers=("plain=bilinear",),
        protocols=("oracle",),
        versus=("plain",),
    )
    evaluate(config)
    with pytest.raises(ValueError, match="take part, plain; got bilinear"):
        evaluate(replace(config, versus=("bilinear",)))


@pytest.mark.parametrize("looks", [(), (2,), (1, 0)])
def test_looks_must_be_square_numbers(looks):
    with pytest.raises(ValueError, match="looks must be square numbers"):
        EvaluationConfig(looks=looks)


@pytest.mark.parametrize("typed", ["json:dumps", "x=math:pi"])
def test_a_plug_in_that_is_no_upsampler_is_one_line_and_exit_code_2(typed, capsys):
    assert main(["evaluate", "--upsamplers", typed]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        f"error: --upsamplers: a plug-in must be a function of (source, image, size); {typed!r} "
    )
