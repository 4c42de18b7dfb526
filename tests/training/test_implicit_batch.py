"""Several images side by side: each takes the steps of a fit of its own, and stops by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from featup_hub.training import implicit_batch
from featup_hub.training.implicit import ImplicitConfig, fit
from featup_hub.training.implicit_batch import fit_batch
from featup_hub.upsamplers import JBUStack

TINY = ImplicitConfig(
    views=8,
    held_out=2,
    pca_views=4,
    max_pad=6,
    components=4,
    frequencies=4,
    hidden=16,
    steps=7,
    batch=2,
    taps=2,
    patch=8,
    check_every=3,
)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "change", [{}, {"base": "none", "taps": 0}, {"downsampler": "simple", "dropout": 0.0}]
)
def test_each_is_as_if_fitted_alone(change: dict, images: Tensor, stem) -> None:
    config = replace(TINY, **change)
    for image, found in zip(images, fit_batch(images, stem, config), strict=True):
        alone = fit(image[None], stem, config)
        assert not found.training
        assert torch.equal(found.image[0], image)
        assert found.scores["steps"] == alone.scores["steps"]
        assert found.scores["held_out_error"] == pytest.approx(
            alone.scores["held_out_error"], rel=1e-4
        )
        torch.testing.assert_close(found.features(), alone.features(), atol=1e-4, rtol=1e-4)


def test_over_dozens_of_steps_rounding_grows_but_results_stay_alike(images: Tensor, stem) -> None:
    config = replace(TINY, steps=60, check_every=20, patience=0)
    for image, found in zip(images, fit_batch(images, stem, config), strict=True):
        alone = fit(image[None], stem, config)
        assert found.scores["held_out_error"] == pytest.approx(
            alone.scores["held_out_error"], rel=1e-2
        )
        difference = (found.features() - alone.features()).norm()
        assert difference < 0.1 * alone.features().norm()


def test_an_image_whose_fit_diverges_is_named(images: Tensor, stem) -> None:
    with pytest.raises(RuntimeError, match=r"finite loss of image 0; it diverged at step 1 "):
        fit_batch(images, stem, TINY, highest=200.0)


def test_an_image_that_has_stopped_does_not_stop_the_others(
    images: Tensor, stem, monkeypatch
) -> None:
    check = implicit_batch._Batch.check

    def spoiling(self, step: int) -> None:
        check(self, step)
        self.runs[1].checked = 100 * step  # has stopped
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter[1].fill_(float("nan"))

    monkeypatch.setattr(implicit_batch._Batch, "check", spoiling)
    found = fit_batch(images, stem, TINY)
    assert [upsampler.scores["steps"] for upsampler in found] == [7, 3, 7]
    assert all(upsampler.features().isfinite().all() for upsampler in found)


def test_all_may_start_from_stages(images: Tensor, stem) -> None:
    stack = JBUStack().eval()
    for image, found in zip(images, fit_batch(images, stem, TINY, start=stack), strict=True):
        assert found.base is not None
        assert found.base.shape[-2:] == image.shape[-2:]
        alone = fit(image[None], stem, TINY, start=stack)
        torch.testing.assert_close(found.features(), alone.features(), atol=1e-4, rtol=1e-4)


def test_each_stops_by_itself_and_the_steps_end_with_the_last(
    images: Tensor, stem, monkeypatch
) -> None:
    errors = {0: [5.0, 6, 6, 6, 6], 1: [5.0, 4, 6, 6, 6], 2: [5.0, 4, 3, 2, 1]}
    looks: dict[int, list[int]] = {0: [], 1: [], 2: []}
    number = {float(image.sum()): n for n, image in enumerate(images)}

    def check(self, step: int) -> None:
        n = number[float(self.image.sum())]
        self.checked, error = step, errors[n][len(looks[n])]
        looks[n].append(step)
        if error < self.error:
            self.error, self.best_step, self.best = error, step, self._network()

    monkeypatch.setattr(implicit_batch.Run, "check", check)
    found = fit_batch(images, stem, TINY, steps=5, check_every=1, patience=1)
    assert looks == {0: [1, 2], 1: [1, 2, 3], 2: [1, 2, 3, 4, 5]}
    assert [upsampler.scores["steps"] for upsampler in found] == [1, 2, 5]


def test_bad_batches_are_refused(images: Tensor, stem) -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\) with N >= 1; got \(3, 32, 40\)"):
        fit_batch(images[0], stem)
    with pytest.raises(ValueError, match=r"N >= 1; got \(0, 3, 32, 40\)"):
        fit_batch(images[:0], stem)
    with pytest.raises(TypeError, match=r"image of float32; got torch.uint8; make it with"):
        fit_batch(images.byte(), stem)
    with pytest.raises(ValueError, match=r"number of steps; got seconds=3; set steps"):
        fit_batch(images, stem, seconds=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        fit_batch(images, stem, stepz=3)
