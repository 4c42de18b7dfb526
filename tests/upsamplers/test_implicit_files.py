"""Files of implicit upsamplers: exact, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featup_hub import ImplicitUpsampler
from featup_hub.weights import metadata, read, write
from tests.upsamplers.small_implicit import make


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ("image", "mean", "fourier.phase", "layers.1.weight")),
        ("layers.1.weight", torch.zeros(3, 3)),
        ("stray", torch.zeros(3)),
        ("image", torch.zeros(1, 3, 9, 13, dtype=torch.long)),
        ("directions", torch.zeros(4)),
    ],
)
def test_a_file_whose_tensors_are_missing_or_do_not_fit_is_refused(
    name: str, value: torch.Tensor | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    make().save(path)
    tensors = {**read(path), name: value}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write(kept, path, metadata=metadata(path))
    with pytest.raises(ValueError, match=r"missing or wrong|missing: |does not fit Implicit"):
        ImplicitUpsampler.load(path)


@pytest.mark.parametrize(
    ("note", "spoilt"),
    [
        *(("dropout", note) for note in ("1.0", "nan", "much", None)),
        *(("scores", note) for note in ("not JSON", "[]", "null", '{"a": "b"}', None)),
        *((note, None) for note in ("backbone", "backbone_digest")),
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


def test_a_file_in_double_precision_tells_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    module = make(base=True)
    module.save(path)
    write({k: v.double() for k, v in read(path).items()}, path, metadata=metadata(path))
    assert torch.equal(ImplicitUpsampler.load(path).features(), module.features())
