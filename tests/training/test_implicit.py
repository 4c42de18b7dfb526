"""The fit: views and points, terms of the loss, early stop, exact resumption, recipes, commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featup_hub
from featup_hub.backbones import Backbone
from featup_hub.cli import main
from featup_hub.training import implicit
from featup_hub.training.images import seeded
from featup_hub.training.implicit import PRESETS, ImplicitConfig, fit
from featup_hub.training.implicit_views import look, points_of
from featup_hub.training.losses import blur_residual, magnitude_tv, mean_magnitude
from featup_hub.training.views import Jitter, apply_jitter, sample_jitter
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack

TINY = ImplicitConfig(
    views=12,
    held_out=3,
    pca_views=6,
    max_pad=6,
    components=4,
    frequencies=4,
    hidden=16,
    steps=6,
    batch=2,
    taps=2,
    patch=8,
    check_every=3,
)


class Blur(Backbone):
    """Means of a few functions of the colours over each patch: a blur of what is to be found."""

    name = "blur"

    def __init__(self) -> None:
        super().__init__(feat_dim=5, patch_size=8)

    def features(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(self.pixels(image), 8)

    def pixels(self, image: Tensor) -> Tensor:
        return torch.cat([image, image[:, :1] * image[:, 1:2], image[:, 2:].tanh()], dim=1)


def picture(height: int = 40, width: int = 56) -> Tensor:
    """Smooth colours, and a disc of others."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    ground = torch.stack([y, x, y * x])
    disc = ((y - 0.2) ** 2 + (x + 0.1) ** 2 < 0.25).float()
    return (ground * (1 - disc) + disc * torch.tensor([1.5, -1.0, 0.7])[:, None, None])[None]


# Views and points ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_points_are_those_that_a_jittered_map_shows(seed: int) -> None:
    jitter = sample_jitter((40, 56), max_pad=8, generator=seeded(seed))
    y, x = (torch.arange(n, dtype=torch.float64).add(0.5).div(n) for n in (40, 56))
    own = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
    seen = apply_jitter(own, [jitter])[0]
    points = points_of([jitter], (40, 56))[0]
    inside = ((points > 0.02) & (points < 0.98)).all(-1)
    assert inside.any()
    assert (points.movedim(-1, 0) - seen).abs().amax(0)[inside].max() < 1e-6


def test_random_points_stay_in_their_cells_and_are_even_in_the_mean() -> None:
    jitters = [Jitter(), Jitter(flip=True, zoom=2.0, top=0.25, left=0.5)]
    middles = points_of(jitters, (5, 7))
    drawn = torch.stack([points_of(jitters, (5, 7), seeded(n)) for n in range(300)])
    reach = torch.tensor([[0.5 / 5, 0.5 / 7], [0.25 / 5, 0.25 / 7]]).double()[:, None, None]
    assert ((drawn - middles).abs() <= reach + 1e-9).all()
    assert ((drawn.mean(0) - middles).abs() < 0.2 * reach).all()
    assert torch.equal(points_of(jitters, (5, 7), seeded(1)), drawn[1])


def test_the_backbone_sees_every_view_once_and_components_turn_back_into_its_features() -> None:
    backbone, image = Blur(), picture()
    config = replace(TINY, components=5)
    count = 0

    def count_images(_module: object, args: tuple[Tensor]) -> None:
        nonlocal count
        count += len(args[0])

    backbone.register_forward_pre_hook(count_images)
    pca, fitted, held_out = look(image, backbone, config)
    assert count == 15
    assert fitted.jitters[0].is_identity
    assert (len(fitted.jitters), len(held_out.jitters)) == (12, 3)
    assert not set(fitted.jitters) & set(held_out.jitters)
    for views in (fitted, held_out):
        for n, jitter in enumerate(views.jitters):
            expected = backbone(apply_jitter(image, [jitter]))[0]
            found = torch.einsum("ck,khw->chw", pca.directions, views.features[n].float())
            torch.testing.assert_close(
                found + pca.mean[:, None, None], expected, atol=5e-3, rtol=5e-3
            )


def test_the_backbone_looks_in_evaluation_mode_and_gets_its_mode_back() -> None:
    backbone, modes = Blur().train(), []
    backbone.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    look(picture(), backbone, TINY)
    assert not any(modes)
    assert backbone.training


# Terms of the loss --------------------------------------------------------------------------


def test_the_blur_term_is_what_a_binomial_kernel_changes() -> None:
    x = torch.randn(2, 3, 7, 5)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    blurred = F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).reshape(x.shape)
    torch.testing.assert_close(blur_residual(x), (x - blurred).square().mean())
    assert float(blur_residual(torch.full((1, 2, 4, 4), 3.0))) == 0
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert float(blur_residual(checks)) > 0.5  # what the kernel takes out most


def test_the_magnitude_is_the_mean_length() -> None:
    x = torch.zeros(1, 2, 2, 2)
    x[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    assert float(mean_magnitude(x)) == pytest.approx(5 / 4, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("magnitude_weight", mean_magnitude),
        ("tv_weight", magnitude_tv),
        ("blur_weight", blur_residual),
    ],
)
def test_each_term_lowers_what_it_punishes(name: str, term) -> None:
    none = {"magnitude_weight": 0.0, "tv_weight": 0.0, "blur_weight": 0.0}
    config = replace(TINY, steps=40, check_every=40, base="none", **none)
    lengths = []
    for weight in (0.0, 30.0):
        upsampler = fit(picture(), Blur(), replace(config, **{name: weight}))
        coordinates = torch.einsum(
            "kc,bchw->bkhw",
            torch.linalg.pinv(upsampler.directions),
            upsampler.features() - upsampler.mean[:, None, None],
        )
        lengths.append(float(term(coordinates)))
    assert lengths[1] < 0.7 * lengths[0]


# What a fit finds ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("taps", [4, 0])
def test_it_finds_the_features_that_were_blurred_better_than_bilinear(taps: int) -> None:
    image, backbone = picture(), Blur()
    config = replace(
        TINY, views=60, steps=150, batch=4, taps=taps, frequencies=6, components=5, lr=8e-3,
        hidden=32, check_every=50, blur_weight=0.01, tv_weight=0.0, downsampler="simple",
    )  # fmt: skip
    upsampler = fit(image, backbone, config)
    truth = backbone.pixels(image)
    bilinear = F.interpolate(backbone(image), (40, 56), mode="bilinear")
    error = (upsampler.features() - truth).square().mean()
    assert error < 0.5 * (bilinear - truth).square().mean()
    assert upsampler.scores["held_out_error"] < 0.1
    assert upsampler.scores["explained_variance"] == pytest.approx(1, abs=1e-3)


class Spotted(Blur):
    """The same, with a pattern that stays where it is when the image moves, as ViTs have it."""

    def features(self, image: Tensor) -> Tensor:
        seen = super().features(image)
        return seen + 0.5 * torch.randn(seen.shape[1:], generator=seeded(5))


@pytest.mark.slow
def test_what_does_not_move_with_the_image_is_averaged_out_of_its_features() -> None:
    image, backbone = picture(), Spotted()
    config = replace(
        TINY, views=60, steps=150, batch=4, taps=4, components=5, lr=8e-3, hidden=32,
        base="none", check_every=50, downsampler="simple", tv_weight=0.0, max_pad=16,
    )  # fmt: skip
    clean = Blur()(image)
    noise = (backbone(image) - clean).square().mean()
    kept = F.avg_pool2d(fit(image, backbone, config).features(), 8) - clean
    assert kept.square().mean() < 0.3 * noise


def test_a_fit_is_in_evaluation_mode_without_gradients_and_knows_its_backbone() -> None:
    upsampler = fit(picture(), Blur(), TINY)
    assert isinstance(upsampler, ImplicitUpsampler)
    assert not upsampler.training
    assert not any(p.requires_grad for p in upsampler.parameters())
    assert upsampler.backbone == "blur"
    assert len(upsampler.backbone_digest) == 64
    assert upsampler.features().shape == (1, 5, 40, 56)


def test_it_begins_with_the_images_own_features_unless_told_not_to() -> None:
    image, backbone = picture(), Blur()
    upsampler = fit(image, backbone, TINY, lr=1e-12, components=5)
    expected = F.interpolate(backbone(image), (40, 56), mode="bilinear")
    torch.testing.assert_close(upsampler.features(), expected, atol=1e-2, rtol=1e-2)
    assert fit(image, backbone, TINY, base="none", steps=1).base is None
    assert PRESETS["upstream"].base == "none"


def test_started_from_stages_it_is_at_first_the_stages() -> None:
    stack = JBUStack().eval()
    image, backbone = picture(), Blur()
    upsampler = fit(image, backbone, TINY, start=stack, lr=1e-12, components=5)
    expected = stack(backbone(image) - upsampler.mean[:, None, None], image)
    found = upsampler.features() - upsampler.mean[:, None, None]
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_what_is_kept_is_the_best_on_held_out_views_and_patience_ends(monkeypatch) -> None:
    errors = iter([0.5, 0.3, 0.4, 0.6, 0.7, 0.8])
    steps = []

    def check(self, step: int) -> None:
        self.checked, error = step, next(errors)
        steps.append(step)
        if error < self.error:
            self.error, self.best_step, self.best = error, step, self._network()
            kept.clear()
            kept.update(self._network())

    kept: dict[str, Tensor] = {}
    monkeypatch.setattr(implicit.Run, "check", check)
    upsampler = fit(picture(), Blur(), TINY, steps=100, check_every=2, patience=3)
    assert steps == [2, 4, 6, 8, 10]
    assert upsampler.scores["held_out_error"] == 0.3
    assert upsampler.scores["steps"] == 4
    for name, value in upsampler.state_dict().items():
        assert torch.equal(value, kept[name])


def test_time_ends_a_fit(monkeypatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(implicit.time, "monotonic", lambda: float(next(clock)))
    upsampler = fit(picture(), Blur(), TINY, seconds=5, steps=100, check_every=1, patience=0)
    assert upsampler.scores["steps"] <= 5


# The same result ----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(
    monkeypatch,
) -> None:
    # This one would reseed the generators of all devices.
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("seeded every device"))
    before = torch.get_rng_state()
    first, second = (fit(picture(), Blur(), TINY).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = fit(picture(), Blur(), TINY, seed=1).state_dict()
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


class StoppedError(Exception):
    """What stops a fit in the tests."""


@pytest.mark.parametrize("at", [4, 5, 7])
def test_a_stopped_fit_goes_on_to_the_same_weights(at: int, tmp_path: Path, monkeypatch) -> None:
    config = replace(TINY, steps=9)
    whole = fit(picture(), Blur(), config)
    step = implicit.Run.step

    def stopping(self, number: int, passed: float) -> float:
        if number == at:
            raise StoppedError
        return step(self, number, passed)

    checkpoint = tmp_path / "fit.pt"
    with monkeypatch.context() as patch:
        patch.setattr(implicit.Run, "step", stopping)
        with pytest.raises(StoppedError):
            fit(picture(), Blur(), config, checkpoint=checkpoint)
    resumed = fit(picture(), Blur(), config, checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.scores == whole.scores


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "fit.pt"
    fit(picture(), Blur(), TINY, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"another config \(seed: 0 there, 1 here\)"):
        fit(picture(), Blur(), TINY, checkpoint=checkpoint, seed=1)
    with pytest.raises(ValueError, match=r"another config \(image: "):
        fit(picture() + 0.1, Blur(), TINY, checkpoint=checkpoint)


# Sizes, recipes, options --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 40), (33, 50), (9, 11)])
def test_any_size_of_image_is_fitted(size: tuple[int, int]) -> None:
    upsampler = fit(picture(*size), Blur(), TINY, steps=2, max_pad=3)
    features = upsampler.features()
    assert features.shape == (1, 5, *size)
    assert features.isfinite().all()


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


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one normalised RGB image, \(1, 3, H, W\); got \(2, 3,"):
        fit(torch.zeros(2, 3, 16, 16), Blur())
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        fit(picture(), Blur(), steps=0)
    with pytest.raises(ValueError, match=r"taps >= 0, .* and dropout in \[0, 1\); got .*dropout=1"):
        fit(picture(), Blur(), dropout=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        fit(picture(), Blur(), stepz=3)


def test_fit_is_a_name_of_the_package() -> None:
    assert featup_hub.fit is fit
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        _ = featup_hub.fitt


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
    assert told == [None, "mine.safetensors"]
