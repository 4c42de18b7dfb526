"""Upstream's checkpoints: strict, complete, and never executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from featup_hub import JBUStack, weights


def state(feat_dim: int = 4, *, norm: bool = True) -> dict[str, Tensor]:
    """A state as upstream's training module has it."""
    tensors = {f"upsampler.{n}": t for n, t in JBUStack(feat_dim).state_dict().items()}
    if norm:
        tensors["model.1.norm.weight"] = torch.rand(feat_dim)
        tensors["model.1.norm.bias"] = torch.rand(feat_dim)
    tensors["downsampler.w"] = torch.rand(16, 16)
    tensors["scale_net.net.bias"] = torch.rand(1)
    return tensors


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}])
def test_every_tensor_arrives_in_its_place(tmp_path, wrap):
    tensors = state()
    source, out = saved(tmp_path / "in.ckpt", wrap(tensors)), tmp_path / "out.safetensors"
    checkpoint = weights.convert(source, out)
    assert checkpoint.feat_dim == 4
    for upsampler, norm in (
        (checkpoint.upsampler, checkpoint.norm),
        weights.split_norm(weights.read(out)),
    ):
        assert len(upsampler) == 42
        for name, tensor in upsampler.items():
            assert torch.equal(tensor, tensors[f"upsampler.{name}"])
        assert torch.equal(norm["weight"], tensors["model.1.norm.weight"])
        assert torch.equal(norm["bias"], tensors["model.1.norm.bias"])


def test_the_file_tells_where_it_comes_from(tmp_path):
    source = saved(tmp_path / "in.ckpt", state(norm=False))
    weights.convert(source, tmp_path / "out.safetensors")
    assert weights.metadata(tmp_path / "out.safetensors") == {
        "format_version": "1",
        "feat_dim": "4",
        "source": "in.ckpt",
        "source_sha256": weights.digest(source),
    }
    assert len(weights.read(tmp_path / "out.safetensors")) == 42  # nothing of the training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.0.blocks.0.weight": torch.ones(1)}, r"not known here: model.0.blocks.0.weight"),
        ({"upsampler.up5.range_temp": torch.ones(())}, r"not known here: upsampler.up5.range_temp"),
        ({"upsampler.up2.range_temp": None}, r"missing: upsampler.up2.range_temp"),
        ({"upsampler.fixup_proj.1.bias": None}, r"missing: upsampler.fixup_proj.1.bias"),
        ({"model.1.norm.bias": None}, r"missing: model.1.norm.bias"),
        ({"model.1.norm.bias": torch.ones(5)}, r"model.1.norm.bias \(5,\), needed \(4,\)"),
        (
            {"upsampler.up1.fixup_proj.3.bias": torch.ones(25)},
            r"upsampler.up1.fixup_proj.3.bias \(25,\), needed \(49,\)",
        ),
        (
            {"upsampler.up1.range_temp": torch.tensor(1)},
            r"range_temp \(\) torch.int64, needed \(\)",
        ),
        ({"upsampler.up1.range_temp": 1.0}, r"missing: upsampler.up1.range_temp"),
    ],
)
def test_what_is_not_upstreams_is_refused_by_name(tmp_path, change, message):
    wrong = {name: value for name, value in {**state(), **change}.items() if value is not None}
    path = saved(tmp_path / "in.ckpt", wrong)
    with pytest.raises(ValueError, match=rf"in.ckpt must be a checkpoint of FeatUp.*{message}"):
        weights.convert_upstream(path)
    with pytest.raises(ValueError, match="nothing was loaded"):
        weights.convert(path, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [path]


def test_an_upsampler_of_ours_needs_no_conversion(tmp_path):
    converted = tmp_path / "out.safetensors"
    weights.convert(saved(tmp_path / "in.ckpt", state()), converted)
    pickled = tmp_path / "ours.pth"
    torch.save(JBUStack().state_dict(), pickled)
    for path in (converted, weights.resolve("jbu_denoise"), pickled):
        with pytest.raises(ValueError, match=r"of this package, .* no conversion; give .*save_f"):
            weights.convert(path, tmp_path / "two.safetensors")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.witness),)


def test_a_malicious_checkpoint_is_refused_and_never_run(tmp_path):
    witness = tmp_path / "witness"
    path = saved(tmp_path / "in.ckpt", {"state_dict": {**state(), "bomb": Bomb(witness)}})
    with pytest.raises(ValueError, match="more than tensors in it, which may run code") as caught:
        weights.convert_upstream(path)
    assert not witness.exists()
    assert "weights_only" not in str(caught.value)  # the message does not advise unsafe loading
    assert caught.value.__context__ is None  # PyTorch's own error advises just that
    torch.load(path, weights_only=False)
    assert witness.exists()  # the bomb was live


def test_a_flipped_bit_in_a_tensor_is_seen(tmp_path):
    path = saved(tmp_path / "in.ckpt", state())
    data = bytearray(path.read_bytes())
    tensor = weights.convert_upstream(path).upsampler["up3.range_proj.3.weight"]
    data[data.index(tensor.numpy().tobytes()) + 100] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a damaged file: .* fails its checksum"):
        weights.convert_upstream(path)
