"""Pictures of features: one shared basis, reproducible, no copies of large maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featup_hub.visualize import comparison, contact_sheet, fit_pca, pca_rgb


def map_with_structure(channels: int = 12, height: int = 20, width: int = 30) -> Tensor:
    """Three orthogonal directions of falling strength, and a mean far from zero."""
    directions = torch.linalg.qr(torch.randn(channels, 3)).Q
    strength = torch.randn(3, height, width) * torch.tensor([9.0, 3.0, 1.0])[:, None, None]
    return 5 + torch.einsum("ck,khw->chw", directions, strength)[None]


def test_the_components_are_those_of_an_independent_pca():
    features = map_with_structure()
    basis = fit_pca(features)
    rows = features[0].flatten(1).T.double().numpy()
    covariance = np.cov(rows.T)
    _, vectors = np.linalg.eigh(covariance)
    expected = vectors[:, ::-1][:, :3]
    overlap = np.abs(expected.T @ basis.components.double().numpy())
    assert np.allclose(overlap, np.eye(3), atol=1e-5)
    assert np.allclose(rows.mean(0), basis.mean, atol=1e-5)


def test_a_basis_has_no_arbitrary_sign():
    features = map_with_structure()
    basis = fit_pca(features)
    peaks = basis.components.gather(0, basis.components.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()
    again = fit_pca(features.clone(memory_format=torch.channels_last))
    assert torch.equal(basis.components, again.components)


def test_colours_fill_the_range_and_ignore_outliers():
    features = map_with_structure(height=40, width=40)
    plain = pca_rgb(features, fit_pca(features))
    assert plain.min() == 0
    assert plain.max() == 1
    assert plain.flatten(2).std(2).min() > 0.15
    features[0, :, 3, 3] += 20 * (features[0, :, 5, 5] - features.mean((0, 2, 3)))
    shaken = pca_rgb(features, fit_pca(features))
    assert shaken.flatten(2).std(2).min() > 0.15


def test_one_basis_fits_several_maps():
    first, second = map_with_structure(), map_with_structure(height=7, width=5) + 3
    both = fit_pca(first, second)
    expected = (first.sum((0, 2, 3)) + second.sum((0, 2, 3))) / (600 + 35)
    assert torch.allclose(both.mean, expected, atol=1e-4)
    assert pca_rgb(second, both).shape == (1, 3, 7, 5)


def test_a_large_map_is_sampled_over_its_whole_area():
    features = torch.zeros(1, 4, 300, 300)
    features[0, 0, :150], features[0, 1, :, 150:] = 1, 1
    colours = pca_rgb(features, fit_pca(features, k=2))
    corners = colours[0, :, ::299, ::299].flatten(1)
    assert torch.cdist(corners.T, corners.T).add(torch.eye(4)).min() > 0.5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_colouring_a_large_map_allocates_a_small_share_of_it(memory_format):
    features = torch.randn(1, 64, 128, 128).contiguous(memory_format=memory_format)
    basis = fit_pca(features)
    with torch.profiler.profile(profile_memory=True) as profile:
        pca_rgb(features, basis)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 0.5 * features.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_gives_about_the_same_colours(dtype):
    features = map_with_structure()
    basis = fit_pca(features)
    assert (pca_rgb(features.to(dtype), basis) - pca_rgb(features, basis)).abs().max() < 0.05


@pytest.mark.parametrize(
    "features", [torch.ones(1, 8, 5, 5), torch.ones(1, 8, 1, 1), torch.ones(1, 2, 4, 4)]
)
def test_where_nothing_varies_all_is_grey(features):
    assert torch.equal(
        pca_rgb(features, fit_pca(features)), torch.full((1, 3, *features.shape[2:]), 0.5)
    )


def test_features_that_are_broken_or_do_not_match_are_refused():
    with pytest.raises(ValueError, match="must be finite; got NaN"):
        fit_pca(torch.full((1, 4, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"same channels; got \[\(1, 4, 2, 2\), \(1, 5, 2, 2\)"):
        fit_pca(torch.ones(1, 4, 2, 2), torch.ones(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\).*got \[\]"):
        fit_pca()
    for given, got in ((np.ones((1, 4, 2, 2)), "'ndarray'"), (torch.ones(0, 4, 2, 2), "0, 4, 2")):
        with pytest.raises(ValueError, match=rf"\(B, C, H, W\).*got .*{got}"):
            fit_pca(given)
    with pytest.raises(ValueError, match=r"features \(B, 4, H, W\); got \('ndarray',\)"):
        pca_rgb(np.ones((1, 4, 2, 2)), fit_pca(torch.ones(1, 4, 2, 2)))
    with pytest.raises(ValueError, match=r"basis is for features \(B, 4, H, W\).*fit one on these"):
        pca_rgb(torch.ones(1, 5, 2, 2), fit_pca(torch.ones(1, 4, 2, 2)))


def test_a_comparison_shows_image_source_bilinear_and_upsampled_in_this_order():
    source = map_with_structure(height=4, width=6)
    upsampled = F.interpolate(source, scale_factor=64)
    photo = Image.new("RGB", (384, 256), "green")
    sheet = np.asarray(comparison(photo, source, upsampled))
    panels = [sheet[y : y + 256, x : x + 384] for y in (32, 320) for x in (12, 408)]
    assert (panels[0] == (0, 128, 0)).all()
    # Enlarging pixel by pixel is what the source's panel does, so both agree; bilinear is smooth.
    assert np.array_equal(panels[1], panels[3])
    assert len(np.unique(panels[1].reshape(-1, 3), axis=0)) <= 24
    assert len(np.unique(panels[2].reshape(-1, 3), axis=0)) > 1000


def test_bilinear_is_that_of_the_features_themselves():
    source = map_with_structure(height=8, width=4)
    bilinear = F.interpolate(source, (256, 128), mode="bilinear")
    sheet = np.asarray(comparison(Image.new("RGB", (128, 256)), source, bilinear)).astype(int)
    cell = (sheet.shape[1] - 12) // 4
    third, fourth = (sheet[32 : 32 + 256, 12 + cell * i : 12 + cell * i + 128] for i in (2, 3))
    assert np.abs(third - fourth).max() <= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((30, 20), (240, 160)), ((500, 300), (500, 300)), ((3000, 1500), (1024, 512))],
)
def test_panels_are_neither_tiny_nor_huge(size, expected):
    sheet = contact_sheet([("a", Image.new("RGB", size, "black"))], size=size, columns=1)
    black = (np.asarray(sheet)[32:-12, 12:] == 0).all(2)
    assert (black.sum(1).max(), black.sum(0).max()) == expected


def test_captions_are_drawn_with_glyphs_the_font_has(monkeypatch):
    def strip(text):
        panel = Image.new("RGB", (256, 256), "white")
        return np.asarray(contact_sheet([(text, panel)], size=(256, 256), columns=1))[:32]

    captions: list[str] = []

    def note(panels, **_):
        captions.extend(caption for caption, _ in panels)
        return panels[0][1]

    monkeypatch.setattr("featup_hub.visualize.contact_sheet", note)
    comparison(Image.new("RGB", (8, 8)), torch.randn(1, 4, 2, 2), torch.randn(1, 4, 8, 8))
    assert len(captions) == 4
    missing = strip("\uffff")
    for character in set("".join(captions)) - {" "}:
        assert strip(character).min() < 128
        assert not np.array_equal(strip(character), missing)


def test_a_path_and_maps_of_different_channels_are_not_compared():
    four, five = torch.randn(1, 4, 2, 2), torch.randn(1, 5, 8, 8)
    with pytest.raises(TypeError, match=r"got str; call featup_hub.read_image\(path\)"):
        comparison("photo.jpg", four, four)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must have the same channels, as model\.source"):
        comparison(Image.new("RGB", (8, 8)), four, five)
