"""Weights in formats of users: authors' layouts, wrappers, other classes, damage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featup_hub.backbones import TimmBackbone
from featup_hub.loading import load_backbone
from featup_hub.weights import read_state

State = dict[str, Tensor]
IMAGE = torch.randn(1, 3, 70, 98, generator=torch.Generator().manual_seed(3))


def metas_dinov2(state: State) -> State:
    """Renames timm's tensors to those of Meta's DINOv2 files."""
    meta = {"mask_token": torch.zeros(1, 1), **state}
    if "reg_token" in meta:  # timm adds the class token's position to the class token
        meta["register_tokens"] = meta.pop("reg_token")
        place = torch.randn_like(meta["cls_token"])
        meta["cls_token"] = meta["cls_token"] - place
        meta["pos_embed"] = torch.cat([place, meta["pos_embed"]], dim=1)
    return meta


def metas_dinov3(state: State) -> State:
    """Renames timm's tensors to those of Meta's DINOv3 files."""
    meta = {"mask_token": torch.zeros(1, 1), "rope_embed.periods": torch.ones(16)}
    for name, tensor in state.items():
        name = name.replace("reg_token", "storage_tokens")
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        meta[name] = tensor
    for name in [n for n in meta if n.endswith("attn.qkv.weight")]:
        bias = name.replace("weight", "bias")
        meta[bias] = torch.zeros(len(meta[name]))
        meta[f"{bias}_mask"] = torch.full((len(meta[name]),), float("nan"))
    return meta


def randomised(name: str, **options: Any) -> nn.Module:
    """A network whose every parameter is random, so that none can be missed."""
    model = timm.create_model(name, **options).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.02 * noise
    return model


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("vit_small_patch14_dinov2", metas_dinov2),
        ("vit_small_patch14_reg4_dinov2", metas_dinov2),
        ("vit_small_patch16_dinov3", metas_dinov3),
    ],
)
def test_metas_own_files_give_the_features_of_timms(tmp_path, name, convert, capsys):
    short = {"depth": 2}
    donor = randomised(name, **short)
    torch.save(convert(dict(donor.state_dict())), tmp_path / "meta.pth")
    timms = TimmBackbone(name, weights=donor.state_dict(), backbone_kwargs=short).eval()
    metas = TimmBackbone(name, weights=tmp_path / "meta.pth", backbone_kwargs=short).eval()
    with torch.no_grad():
        torch.testing.assert_close(metas(IMAGE), timms(IMAGE), atol=1e-5, rtol=1e-5)
    assert capsys.readouterr().out == ""


def test_a_dinov3_file_with_biases_names_the_network_that_has_them(tmp_path):
    donor = timm.create_model("vit_small_patch16_dinov3", depth=1)
    state = metas_dinov3(dict(donor.state_dict()))
    state["blocks.0.attn.qkv.bias"][-1] = 1
    torch.save(state, tmp_path / "meta.pth")
    with pytest.raises(ValueError, match="which timm's vit_small_patch16_dinov3 lacks; take vit_s"):
        TimmBackbone(
            "vit_small_patch16_dinov3", weights=tmp_path / "meta.pth", backbone_kwargs={"depth": 1}
        )
    named = "vit_small_patch16_dinov3_qkvb"
    backbone = TimmBackbone(named, weights=tmp_path / "meta.pth", backbone_kwargs={"depth": 1})
    assert backbone.model.blocks[0].attn.v_bias[-1] == 1


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("classes", [0, 10, 1000])
def test_fine_tuned_weights_fit_with_any_number_of_classes(name, classes):
    donor = timm.create_model(name, num_classes=classes).eval()
    backbone = TimmBackbone(name, weights=donor.state_dict()).eval()
    loaded = backbone.model.state_dict()
    assert all(torch.equal(tensor, donor.state_dict()[key]) for key, tensor in loaded.items())
    assert loaded


FORMS: dict[str, Callable[[State], object]] = {
    "a state dict": lambda state: state,
    "timm's trainer": lambda state: {
        "arch": "test_vit", "args": argparse.Namespace(lr=0.1), "epoch": 3, "state_dict": state,
        "optimizer": {"state": {}},
    },
    "an average of weights": lambda state: {
        "state_dict": {n: t + 1 for n, t in state.items()}, "state_dict_ema": state,
    },
    "MAE": lambda state: {"model": state, "epoch": 3},
    "DINO's teacher": lambda state: {
        "teacher": {
            **{f"module.backbone.{n}": t for n, t in state.items()},
            "module.head.mlp.0.weight": torch.ones(2),
        },
    },
    "torch.compile": lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
    "torch.compile in DataParallel": lambda state: {
        f"module._orig_mod.{n}": t for n, t in state.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_trainers_are_understood(tmp_path, form):
    state = timm.create_model("test_vit").state_dict()
    torch.save(FORMS[form](state), tmp_path / "file.pth")
    found = read_state(tmp_path / "file.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_prefixes_in_safetensors_are_left_out_too(tmp_path):
    save_file({"_orig_mod.a": torch.ones(1)}, tmp_path / "file.safetensors")
    assert read_state(tmp_path / "file.safetensors").keys() == {"a"}


def test_without_tensors_nothing_is_downloaded_in_their_place(tmp_path):
    with pytest.raises(ValueError, match="weights must be tensors by name; got an empty mapping"):
        TimmBackbone("test_vit", weights={})
    save_file({}, tmp_path / "file.safetensors")
    with pytest.raises(
        ValueError, match=r"must hold a network's weights.*got dict without tensors"
    ):
        load_backbone("test_vit", weights=tmp_path / "file.safetensors")


def test_weights_stored_as_8_bit_integers_are_refused():
    state = timm.create_model("test_vit").state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.ones(192, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight of torch.int8"):
        TimmBackbone("test_vit", weights=state)


def test_a_single_name_that_looks_wrapped_hides_no_others(tmp_path):
    state = {"backbone.extra": torch.ones(1), "a": torch.ones(2), "b": torch.ones(3)}
    torch.save(state, tmp_path / "file.pth")
    assert read_state(tmp_path / "file.pth").keys() == state.keys()


def test_the_old_format_of_torch_save_and_safetensors_of_any_name_are_read(tmp_path):
    state = {"weight": torch.arange(3.0)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "weights.bin")
    for name in ("old.pth", "weights.bin"):
        assert torch.equal(read_state(tmp_path / name)["weight"], state["weight"])


class Custom:
    """What a pickle of tensors only cannot hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(1), "model": Custom()}, "a pickle with more than tensors in it"),
        ({"epoch": 3}, "dict without tensors"),
        (torch.ones(3), "Tensor without tensors"),
        (b"<html>login</html>", "a web page"),
        (b"hello" * 5, "no file of torch"),
    ],
)
def test_files_without_weights_are_refused_by_what_they_are(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "file.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=f"file.pth must hold a network's weights.*got {message}"):
        read_state(tmp_path / "file.pth")
