"""Weights files: damage is detected, writes are atomic, sources are tried in order."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from featup_hub import weights
from featup_hub.registry import WeightFile

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def some() -> dict[str, Tensor]:
    return {
        "matrix": torch.arange(6.0).reshape(2, 3),
        "scalar": torch.tensor(0.5),
        "half": torch.ones(4, dtype=torch.float16),
        "brain": torch.ones(2, 2, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "nothing": torch.empty(0, 3),
    }


def written(folder: Path) -> Path:
    weights.write(some(), folder / "some.safetensors", metadata={"b": "é", "a": "1", "c": "3"})
    return folder / "some.safetensors"


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype
        for name, tensor in expected.items()
    )


def test_what_is_written_is_read(tmp_path):
    path = written(tmp_path)
    assert equal(weights.read(path), some())
    assert equal(weights.read(str(path), sha256=weights.digest(path).upper()), some())
    assert weights.metadata(path) == {"a": "1", "b": "é", "c": "3"}
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses files without it


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    assert len({weights.digest(written(tmp_path)) for _ in range(8)}) == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_a_flipped_bit_is_seen_of_the_tensors_and_with_a_pinned_digest_anywhere(tmp_path, pinned):
    path = written(tmp_path)
    data, sha256 = bytearray(path.read_bytes()), weights.digest(path) if pinned else None
    tensors = range(8 * (8 + int.from_bytes(data[:8], "little")), len(data) * 8)
    needed = f"sha256 {sha256}; got .*; check the name, or fetch" if pinned else "tensors with sha"
    for position in range(0, len(data) * 8, 97) if pinned else tensors:
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"is not the weights needed: .*{needed}"):
            weights.read(path, sha256=sha256)
        data[position // 8] ^= 1 << position % 8


def zip_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "got a Git LFS pointer .*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "got a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "got a web page"),
        (zip_file(), r"perhaps a PyTorch pickle; convert it with: featup-hub convert"),
        (pickle.dumps({"weight": [1.0]}), "got a Python pickle, which can run code"),
        (b"\xff" * 64, "got Error while deserializing header"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}tail", "got Error while deserializing header"),
    ],
)
@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_other_files_under_the_name_are_named_for_what_they_are(tmp_path, content, message, sha256):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    if sha256 and "deserializing" in message:
        message = f"needed: a file with sha256 {sha256}; got sha256"
    with pytest.raises(ValueError, match=message) as caught:
        weights.read(path, sha256=sha256)
    assert str(path) in str(caught.value)


def test_every_truncation_is_seen(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is not the weights needed: a whole safetensors"):
            weights.read(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*gone.safetensors; check"):
        weights.read(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=r"is a folder; name the file in it"):
        weights.read(tmp_path)


def test_tensors_of_every_type_and_shared_ones_are_written_without_copies(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {
        **{"bytes": torch.tensor([1, 2, 3], dtype=torch.uint8), "truth": torch.tensor(True)},
        **{"whole": base, "row": base[1], "column": base[:, 1], "empty": base[:0]},
        **{"turned": base.T, "grad": nn.Parameter(base)},
        **{"half": base.half(), "brain": base.bfloat16(), "long": base.long()},
    }
    weights.write(tensors, tmp_path / "a.safetensors")
    for found in (weights.read(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(TypeError, match=r"z has type torch.complex64; safetensors files have no"):
        weights.write({"z": torch.ones(1, dtype=torch.complex64)}, tmp_path / "z.safetensors")


def test_a_link_is_replaced_and_its_target_left(tmp_path):
    target = written(tmp_path)
    before = target.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)
    weights.write({"other": torch.ones(3)}, link)
    assert target.read_bytes() == before
    assert not link.is_symlink()
    assert list(weights.read(link)) == ["other"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"where\.safetensors"):
        weights.write(some(), tmp_path / "no" / "where.safetensors")
    with pytest.raises(OSError, match=tmp_path.name):
        weights.write(some(), tmp_path)
    with pytest.raises(TypeError, match=r"metadata must be strings; got feat_dim=3; use str"):
        weights.write(some(), tmp_path / "x.safetensors", metadata={"feat_dim": 3})
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_leave_the_module_as_it_was():
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    right = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    for change, message in (
        ({"bias": None}, "missing: bias"),
        ({"scale": torch.ones(1)}, "not known here: scale"),
        ({"bias": torch.zeros(3)}, r"of another shape or kind: bias \(3,\), needed \(2,\)"),
        ({"bias": torch.zeros(2).long()}, r"bias \(2,\) torch.int64, needed \(2,\)"),
    ):
        wrong = {name: t for name, t in {**right, **change}.items() if t is not None}
        with pytest.raises(ValueError, match=f"^it.ckpt does not fit Linear.*{message}.*feat_dim"):
            weights.load_into(module, wrong, origin="it.ckpt")
        assert equal(dict(module.state_dict()), before)
    weights.load_into(module, right, origin="it.ckpt")
    assert equal(dict(module.state_dict()), right)


def test_shipped_weights_are_found_in_an_installed_wheel(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/featup_hub"
    (package / "weights").mkdir(parents=True)
    monkeypatch.setattr(weights.files, "__file__", str(package / "weights/files.py"))
    assert weights.shipped_folder() == tmp_path / "site-packages/weights"
    (package / "weights_data").mkdir()
    assert weights.shipped_folder() == package / "weights_data"


def test_a_damaged_shipped_file_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.files, "shipped_folder", lambda: tmp_path)
    path = written(tmp_path)
    pinned = WeightFile(filename=path.name, sha256=weights.digest(path))
    assert equal(weights.load(pinned), some())
    path.write_bytes(LFS)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        weights.load(pinned)


def test_a_shipped_file_that_is_missing_says_where_it_was_looked_for():
    with pytest.raises(RuntimeError, match=r"needed x.safetensors; it is not in the sh"):
        weights.resolve(WeightFile(filename="x.safetensors", sha256=""))
