"""Fitted features of both kinds: queries, files, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from featup_hub import FittedFeatures, ImplicitUpsampler, JBUStack
from featup_hub.upsamplers import JBUFit
from featup_hub.weights import metadata, read, write
from tests.upsamplers import small_implicit


def jbu_fit() -> JBUFit:
    draw = torch.Generator().manual_seed(3)
    image, source = (torch.randn(1, *s, generator=draw) for s in ((3, 9, 13), (7, 3, 4)))
    stack = JBUStack(num_stages=2, joint_first=True)
    return JBUFit(image, source, stack).eval().requires_grad_(False)


KINDS = pytest.mark.parametrize("make", [jbu_fit, small_implicit.make])


def test_a_jbu_fit_is_its_source_upsampled_by_its_stages():
    fitted = jbu_fit()
    expected = fitted.upsampler(fitted.source, fitted.image)
    assert torch.equal(fitted.features(), expected)
    assert torch.equal(fitted(), expected)
    larger = F.interpolate(expected, (18, 26), mode="bilinear")
    torch.testing.assert_close(fitted.features((18, 26)), larger)
    assert fitted.features((3, 4)).shape == (1, 7, 3, 4)
    fitted.source.requires_grad_()
    fitted.features().sum().backward()
    assert (fitted.source.grad != 0).all()


@KINDS
def test_points_at_pixels_have_the_features_of_the_map(make):
    fitted = make()
    points = torch.tensor([[0.0, 0.0], [8.0, 12.0], [3.0, 7.0]])
    found, whole = fitted.features_at(points), fitted.features()[0]
    for n, (row, column) in enumerate(points.long().tolist()):
        torch.testing.assert_close(found[n], whole[:, row, column], atol=1e-5, rtol=1e-5)
    assert fitted.features_at(torch.empty(0, 2)).shape == (0, 7)


@KINDS
def test_points_between_pixels_have_the_features_of_a_larger_map(make):
    fitted = make()
    twice = fitted.features((18, 26))[0]
    # Pixel (2i, 2j) of twice the size lies a quarter of a pixel before the centre of (i, j).
    found = fitted.features_at([[3.75, 6.25]])
    torch.testing.assert_close(found[0], twice[:, 8, 13], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_points_stay_where_they_are_in_half_precision(dtype):
    image, source = torch.randn(1, 3, 3, 1500), torch.randn(1, 7, 3, 750)
    fitted = JBUFit(image, source, JBUStack(num_stages=1)).to(dtype).eval()
    points = torch.tensor([[0, 301], [1, 1177], [2, 1498], [2, 1499]])
    found, whole = fitted.features_at(points), fitted.features()[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found, whole[:, points[:, 0], points[:, 1]].t(), atol=0.02, rtol=0)


@KINDS
def test_wrong_queries_are_refused(make):
    fitted = make()
    with pytest.raises(ValueError, match=r"points must be \(N, 2\), row and column; got \(3,\)"):
        fitted.features_at(torch.zeros(3))
    with pytest.raises(ValueError, match=r"-0.5 to 8.5 by -0.5 to 12.5 pixels; got \[1.0, 13.0\]"):
        fitted.features_at([[8.5, 12.5], [1.0, 13.0]])
    with pytest.raises(ValueError, match=r"8.5 by -0.5 to 12.5 pixels; got \[nan, 0.0\]"):
        fitted.features_at([[math.nan, 0.0]])
    assert fitted.features(18).shape[2:] == fitted.features((18, 26)).shape[2:]
    for size in ((0, 3), (5, -1)):
        with pytest.raises(ValueError, match=rf"must be positive; got \({size[0]}, {size[1]}\)"):
            fitted.features(size)


def test_wrong_parts_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, H, W\); got \(2, 3, 4, 4\); fit one per image"):
        ImplicitUpsampler(torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.eye(2))
    with pytest.raises(TypeError, match=r"image must be a tensor; got PosixPath; model.preproc"):
        JBUFit(Path("a.jpg"), torch.zeros(1, 7, 3, 4), JBUStack())
    with pytest.raises(ValueError, match=r"source must be \(1, C, h, w\); got \(2, 7, 3, 4\)"):
        JBUFit(torch.zeros(1, 3, 9, 13), torch.zeros(2, 7, 3, 4), JBUStack())


@KINDS
def test_a_saved_file_gives_the_same_features_and_kind(make, tmp_path):
    fitted = make()
    fitted.backbone, fitted.backbone_digest = "stem", "ab12"
    fitted.scores = {"held_out_error": 0.25}
    fitted.save(tmp_path / "one.safetensors")
    before = torch.get_rng_state()
    found = FittedFeatures.load(tmp_path / "one.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(found) is type(fitted)
    assert torch.equal(found.features((31, 17)), fitted.features((31, 17)))
    assert (found.backbone, found.backbone_digest) == ("stem", "ab12")
    assert found.scores == {"held_out_error": 0.25}
    assert not found.training
    assert not found.features().requires_grad
    found.save(tmp_path / "two.safetensors")
    first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second


def test_a_fit_of_several_looks_loads_as_one(tmp_path):
    fitted = jbu_fit()
    fitted.upsampler.looks_per_side = 2
    fitted.save(tmp_path / "x.safetensors")
    loaded = FittedFeatures.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.features(), fitted.features())
    fitted.upsampler.looks_per_side = 0
    fitted.save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"looks_per_side must be at least 1, .*got 0; save it"):
        FittedFeatures.load(tmp_path / "x.safetensors")


@KINDS
def test_a_new_process_loads_a_file(make, tmp_path):
    make().save(tmp_path / "x.safetensors")
    code = "from featup_hub import FittedFeatures; FittedFeatures.load('x.safetensors')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"image": torch.zeros(1, 3, 4, 4)}, path)
    with pytest.raises(ValueError, match=r"jbu_fit/1 or .*implicit/2; got a file of other weights"):
        FittedFeatures.load(path)
    jbu_fit().save(path)
    with pytest.raises(ValueError, match=r"format featup_hub.implicit/2; got featup_hub.jbu_fit"):
        ImplicitUpsampler.load(path)
    write(read(path), path, metadata={**metadata(path), "upsampler": "featup_hub.jbu_fit/3"})
    with pytest.raises(ValueError, match=r"got featup_hub.jbu_fit/3; make one with"):
        FittedFeatures.load(path)
    write({"features": torch.zeros(1)}, path, metadata={"upsampler": "d37ed996549d087d"})
    with pytest.raises(ValueError, match=r"got features of featup-hub upsample; make one with"):
        FittedFeatures.load(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        FittedFeatures.load(tmp_path / "none.safetensors")


def save_changed(fitted: FittedFeatures, path: Path, tensors: dict, notes: dict) -> None:
    """Saves a fit with other tensors and notes; None stands for one that is missing."""
    fitted.save(path)
    found = {**read(path), **tensors}, {**metadata(path), **notes}
    kept, others = ({k: v for k, v in each.items() if v is not None} for each in found)
    write(kept, path, metadata=others)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *((jbu_fit, name, None) for name in ("image", "source", "upsampler.up1.range_temp")),
        (jbu_fit, "source", torch.zeros(2, 7, 3, 4)),
        *((small_implicit.make, n, None) for n in ("image", "fourier.phase", "layers.1.weight")),
        (small_implicit.make, "layers.1.weight", torch.zeros(3, 3)),
        (small_implicit.make, "stray", torch.zeros(3)),
        (small_implicit.make, "image", torch.zeros(1, 3, 9, 13, dtype=torch.long)),
        (small_implicit.make, "directions", torch.zeros(4)),
    ],
)
def test_a_file_whose_tensors_are_missing_or_do_not_fit_is_refused(make, name, value, tmp_path):
    save_changed(make(), tmp_path / "x.safetensors", {name: value}, {})
    with pytest.raises(ValueError, match=r"missing or wrong: .*; save it again|does not fit"):
        FittedFeatures.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("note", "spoilt"),
    [
        *(("dropout", note) for note in ("1.0", "nan", "much", None)),
        *(("scores", note) for note in ("not JSON", "[]", "null", '{"a": "b"}', None)),
        *((note, None) for note in ("backbone", "backbone_digest")),
    ],
)
def test_a_file_whose_notes_are_spoilt_or_missing_is_refused(note, spoilt, tmp_path):
    save_changed(small_implicit.make(), tmp_path / "x.safetensors", {}, {note: spoilt})
    with pytest.raises(ValueError, match=r"missing or wrong: .*; save it again"):
        FittedFeatures.load(tmp_path / "x.safetensors")


def test_a_file_in_double_precision_tells_the_same(tmp_path):
    path, module = tmp_path / "x.safetensors", small_implicit.make()
    module.save(path)
    write({k: v.double() for k, v in read(path).items()}, path, metadata=metadata(path))
    assert torch.equal(ImplicitUpsampler.load(path).features(), module.features())


def test_scores_that_are_not_finite_are_not_saved(tmp_path):
    fitted = jbu_fit()
    for score, message in ((math.nan, "not JSON compliant"), ("b", "convert string to float: 'b'")):
        fitted.scores = {"a": score}
        with pytest.raises(ValueError, match=message):
            fitted.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
