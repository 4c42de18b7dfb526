"""What a fit is made of: recipes, choices, values refused, and the command whose flags they are."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from featup_hub.cli import main
from featup_hub.training.implicit import PRESETS, ImplicitConfig, fit
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack
from tests.training.implicit_example import TINY, Blur, picture


def test_upstreams_recipe_has_upstreams_numbers_and_runs() -> None:
    recipe = PRESETS["upstream"]
    assert (recipe.views, recipe.pca_views, recipe.components) == (3000, 50, 128)
    assert (recipe.max_pad, recipe.max_zoom) == (30, 1.8)
    assert (recipe.steps, recipe.batch, recipe.lr, recipe.final_lr) == (1200, 10, 2e-3, 1.0)
    assert (recipe.magnitude_weight, recipe.tv_weight, recipe.blur_weight) == (0.001, 0.05, 0.1)
    assert (recipe.frequencies, recipe.lowest, recipe.highest) == (30, -2, 10)
    assert (recipe.dropout, recipe.hidden, recipe.taps, recipe.patience) == (0.2, 128, 0, 0)
    upsampler = fit(picture(), Blur(), recipe, steps=2, views=4, batch=2, held_out=1)
    widths = [layer.weight.shape[1] for layer in upsampler.layers]
    assert widths == [303, 128, 128]


@pytest.mark.parametrize("change", [{"downsampler": "simple"}, {"uncertainty": False}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_choices_run_and_give_finite_features(change: dict, precision: str) -> None:
    upsampler = fit(picture(), Blur(), TINY, steps=2, precision=precision, **change)
    assert upsampler.features().isfinite().all()


def test_the_default_frequencies_keep_almost_equal_colours_alike() -> None:
    """A grey level more changes the features less than upstream's frequencies make it."""
    changes = []
    for config in (PRESETS["fast"], replace(PRESETS["fast"], highest=10.0)):
        torch.manual_seed(0)
        module = ImplicitUpsampler(
            torch.rand(1, 3, 16, 16),
            torch.zeros(8),
            torch.eye(8),
            frequencies=config.frequencies,
            log_range=(config.lowest, config.highest),
        ).eval()
        place, colour = torch.rand(64, 2), torch.rand(64, 3)
        with torch.no_grad():
            told = module.coordinates(place, colour)
            moved = module.coordinates(place, colour + 1 / 255)
        changes.append(float((moved - told).square().mean() / told.var()))
    assert changes[0] < 0.1 * changes[1]


def test_options_are_checked_before_the_fit() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        fit(picture(), Blur(), steps=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        fit(picture(), Blur(), stepz=3)


@pytest.mark.parametrize(
    "name", [field.name for field in fields(ImplicitConfig) if field.type == "float"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number; got {value}"):
        ImplicitConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("views", 1),
        ("held_out", 1),
        ("batch", 1),
        ("check_every", 1),
        ("max_zoom", 1),
        ("max_pad", 0),
        ("dropout", 0),
        ("seconds", 0),
        ("taps", 0),
        ("magnitude_weight", 0),
        ("tv_weight", 0),
        ("blur_weight", 0),
        ("lr", 0),
        ("final_lr", 0),
        ("patience", 0),
        ("patch", 2),
    ],
)
def test_numbers_below_their_range_are_refused(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least {least}; got {least - 1}"):
        ImplicitConfig(**{name: least - 1})


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"lr": 0.0}, {"lowest": 3.0, "highest": 2.0}])
def test_ranges_that_hold_nothing_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="needs lowest <= highest, lr > 0 and dropout < 1; got "):
        ImplicitConfig(**change)
    assert ImplicitConfig(lowest=2.0, highest=2.0)


@pytest.mark.parametrize("name", ["base", "downsampler", "precision"])
def test_words_that_are_no_choice_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be '\w+' or '\w+'; got 'float16'"):
        ImplicitConfig(**{name: "float16"})


def test_the_command_writes_an_upsampler_and_a_picture(
    tmp_path: Path, photos: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("featup_hub.cli.fit.open_backbones", lambda names: {names[0]: Blur()})
    out = tmp_path / "one.safetensors"
    options = ["--steps", "2", "--views", "4", "--held-out", "1", "--batch", "1", "--max-pad", "4"]
    code = main(["fit", str(photos / "p0.png"), "--out", str(out), "--size", "32", *options])
    assert code == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: held_out_error ")
    upsampler = ImplicitUpsampler.load(out)
    assert min(upsampler.image_size) == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "one.safetensors"]


def test_the_command_starts_from_the_stages_it_is_told(
    tmp_path: Path, photos: Path, monkeypatch
) -> None:
    monkeypatch.setattr("featup_hub.cli.fit.open_backbones", lambda names: {names[0]: Blur()})
    told: list[object] = []

    def load(*, weights: object) -> JBUStack:
        told.append(weights)
        return JBUStack().eval()

    monkeypatch.setattr("featup_hub.cli.fit.load_upsampler", load)
    out = tmp_path / "one.safetensors"
    options = ["--size", "32", "--steps", "1", "--views", "2", "--held-out", "1", "--no-picture"]
    for start in ("jbu_universal", "mine.safetensors"):
        command = ["fit", str(photos / "p0.png"), "--out", str(out), "--start", start, *options]
        assert main(command) == 0
        base = ImplicitUpsampler.load(out).base
        assert base is not None
        assert min(base.shape[-2:]) == 32
    assert told == ["jbu_universal", "mine.safetensors"]
