"""Files of implicit upsamplers: exact, or refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from featup_hub import ImplicitUpsampler
from featup_hub.weights import metadata, read, write
from tests.upsamplers.small_implicit import make


@pytest.mark.parametrize("name", ["image", "mean", "fourier.phase", "layers.1.weight", "base"])
def test_a_file_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make(base=True).save(path)
    tensors = read(path)
    del tensors[name]
    write(tensors, path, metadata=metadata(path))
    with pytest.raises(ValueError, match=r"missing or wrong|missing: "):
        ImplicitUpsampler.load(path)


@pytest.mark.parametrize(
    "change", ["shape", "surplus", "notes", "depth", "mean", "kind", "base", "square"]
)
def test_a_file_whose_parts_do_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make().save(path)
    tensors, notes = read(path), metadata(path)
    if change == "shape":
        tensors["layers.1.weight"] = torch.zeros(3, 3)
    elif change == "surplus":
        tensors["stray"] = torch.zeros(3)
    elif change == "notes":
        notes["scores"] = "not JSON"
    elif change == "depth":
        notes["scores"] = "[" * 5000
    elif change == "mean":
        tensors["mean"] = torch.zeros(8)
    elif change == "kind":
        tensors["image"] = tensors["image"].long()
    elif change == "base":
        tensors["base"] = torch.zeros(1, 5, 3, 5)
    else:
        tensors["directions"] = torch.zeros(4)
    write(tensors, path, metadata=notes)
    with pytest.raises(ValueError, match=r"missing or wrong|does not fit ImplicitUpsampler"):
        ImplicitUpsampler.load(path)


@pytest.mark.parametrize(
    ("note", "spoilt"),
    [
        ("base", "yes"),
        ("base", "maybe"),
        ("dropout", "1.0"),
        ("dropout", "nan"),
        ("dropout", "much"),
        ("scores", '{"a": "b"}'),
        ("scores", '{"a": NaN}'),
        ("scores", '{"a": 1e999}'),
        ("scores", '{"a": null}'),
        ("scores", '[["a", 1.0]]'),
        ("scores", "[]"),
        ("scores", "null"),
        ("scores", '{"a": 1' + 400 * "0" + "}"),
        *((note, None) for note in ("backbone", "backbone_digest", "base", "dropout", "scores")),
    ],
)
def test_a_file_whose_notes_are_spoilt_or_missing_is_refused(
    note: str, spoilt: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    make().save(path)
    notes = {**metadata(path), note: spoilt}
    write(read(path), path, metadata={k: v for k, v in notes.items() if v is not None})
    with pytest.raises(ValueError, match=r"missing or wrong: .*; save it again"):
        ImplicitUpsampler.load(path)


@pytest.mark.parametrize("name", ["image", "base", "fourier.frequency", "layers.2.bias"])
def test_a_file_with_numbers_that_are_not_finite_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    module = make(base=True)
    with torch.no_grad():
        module.state_dict()[name].view(-1)[0] = math.inf
    module.save(path)
    with pytest.raises(ValueError, match=rf"must have finite numbers; got others in {name}"):
        ImplicitUpsampler.load(path)


def test_a_file_in_double_precision_tells_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    module = make(base=True)
    module.save(path)
    write({k: v.double() for k, v in read(path).items()}, path, metadata=metadata(path))
    assert torch.equal(ImplicitUpsampler.load(path).features(), module.features())
