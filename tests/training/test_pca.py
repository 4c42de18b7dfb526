"""Principal components against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from featup_hub.training.pca import fit_pca


def features(seed: int = 0, shape: tuple[int, ...] = (5, 12, 4, 6)) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, shape[1] + 1).float().flip(0)[:, None, None]
    mixed = torch.randn(shape[1], shape[1], generator=draw)
    maps = torch.randn(shape, generator=draw) * spread + 3
    return torch.einsum("kc,bchw->bkhw", mixed, maps)


def test_components_mean_and_variances_are_those_of_the_singular_value_decomposition() -> None:
    x = features()
    rows = x.movedim(1, -1).flatten(0, 2).double()
    centred = rows - rows.mean(0)
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    pca = fit_pca(x, 5)
    torch.testing.assert_close(pca.mean, rows.mean(0).float())
    alignment = (pca.components.double() * right[:5]).sum(1)
    torch.testing.assert_close(alignment.abs(), torch.ones(5).double())
    shares = singular.square() / singular.square().sum()
    assert pca.explained == pytest.approx(float(shares[:5].sum()))
    variance = singular[:5].square().mean() / len(rows)
    assert float(pca.scale) == pytest.approx(float(variance.sqrt()), rel=1e-5)


def test_all_components_turn_back_exactly_and_few_leave_the_unexplained() -> None:
    x = features(1)
    centred = (x - x.mean((0, 2, 3), keepdim=True)).square().sum()
    for count in (12, 4):
        pca = fit_pca(x, count)
        turned = torch.einsum("ck,bkhw->bchw", pca.directions, pca.project(x))
        residual = (turned + pca.mean[:, None, None] - x).square().sum() / centred
        assert float(residual) == pytest.approx(1 - pca.explained, abs=1e-6)
    assert fit_pca(x, 12).explained == pytest.approx(1)


def test_coordinates_have_mean_zero_and_mean_variance_one() -> None:
    x = features(2)
    z = fit_pca(x, 6).project(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    assert float(z.square().mean()) == pytest.approx(1, rel=1e-4)


def test_fewer_positions_than_channels_and_more_components_than_channels_are_fine() -> None:
    x = features(3, (1, 12, 2, 3))
    assert fit_pca(x, 100).components.shape == (12, 12)
    assert fit_pca(x, 5).explained == pytest.approx(1, abs=1e-6)  # six points span five directions


def test_the_same_features_give_the_same_signs() -> None:
    x = features(4)
    assert torch.equal(fit_pca(x, 5).components, fit_pca(x.clone(), 5).components)
    entries = fit_pca(x, 5).components
    assert (entries.gather(1, entries.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("bad", [torch.ones(2, 3, 4, 4), torch.full((1, 3, 2, 2), torch.nan)])
def test_features_that_do_not_vary_or_are_not_finite_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"finite and vary; their variance is .*; check backbone"):
        fit_pca(bad, 2)
