"""The fit: what it finds, when it stops or gives up, exact resumption, arguments left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featup_hub
from featup_hub.training import implicit
from featup_hub.training.implicit import PRESETS, fit
from featup_hub.training.seeds import seeded
from featup_hub.upsamplers import ImplicitUpsampler, JBUStack
from tests.training.implicit_example import TINY, Blur, picture

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


@pytest.mark.parametrize("size", [(24, 40), (33, 50), (9, 11)])
def test_any_size_of_image_is_fitted(size: tuple[int, int]) -> None:
    upsampler = fit(picture(*size), Blur(), TINY, steps=2, max_pad=3)
    features = upsampler.features()
    assert features.shape == (1, 5, *size)
    assert features.isfinite().all()


# When there is nothing to find --------------------------------------------------------------


@pytest.mark.parametrize("change", [{"highest": 200.0}, {"lr": 1e30, "dropout": 0.0}])
def test_a_fit_that_diverges_says_so_and_keeps_nothing(change: dict, tmp_path: Path) -> None:
    checkpoint = tmp_path / "fit.pt"
    with pytest.raises(RuntimeError, match=r"diverged at step \d.*; lower lr or highest"):
        fit(picture(), Blur(), replace(TINY, check_every=1, **change), checkpoint=checkpoint)
    if checkpoint.exists():  # from a step at which all was well
        assert torch.load(checkpoint, weights_only=True)["error"] < float("inf")


def test_weights_spoilt_by_the_last_step_are_found_by_the_held_out_views(monkeypatch) -> None:
    step = implicit.Run.step

    def spoiling(self, number: int, passed: float) -> float:
        loss = step(self, number, passed)
        torch.nn.init.constant_(self.objective.model.layers[2].bias, float("nan"))
        return loss

    monkeypatch.setattr(implicit.Run, "step", spoiling)
    with pytest.raises(RuntimeError, match=r"finite held-out error; it diverged at step 1 \(nan\)"):
        fit(picture(), Blur(), TINY, steps=1)


def test_no_held_out_error_is_shown_before_it_is_known(monkeypatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(implicit.Progress, "advance", lambda bar, note: shown.append(note))
    fit(picture(), Blur(), replace(TINY, check_every=2), steps=3, progress=True)
    assert [" held-out error 0." in note for note in shown] == [False, True, True]
    assert all(note.startswith("loss ") and "inf" not in note for note in shown)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_images_of_other_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"image of float32; got {dtype}; make it with"):
        fit(picture().to(dtype), Blur(), TINY)


def test_images_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one normalised RGB image, \(1, 3, H, W\); got \(2, 3,"):
        fit(torch.zeros(2, 3, 16, 16), Blur())


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


def test_the_stages_started_from_stay_where_they_are_and_in_their_mode(monkeypatch) -> None:
    stack, moved = JBUStack().train(), []
    monkeypatch.setattr(JBUStack, "to", lambda self, *_: moved.append(self) or self)
    fit(picture(), Blur(), TINY, steps=1, start=stack)
    assert moved
    assert all(other is not stack for other in moved)
    assert all(module.training for module in stack.modules())


def test_fit_is_a_name_of_the_package() -> None:
    assert featup_hub.fit is fit
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        _ = featup_hub.fitt


def test_a_checkpoint_without_its_parts_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "fit.pt"
    fit(picture(), Blur(), TINY, checkpoint=checkpoint)
    state = torch.load(checkpoint)
    del state["best"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint .* \(KeyError\); remove"):
        fit(picture(), Blur(), TINY, checkpoint=checkpoint)
