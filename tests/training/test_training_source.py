"""A source of training: projections and standardised features."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from featup_hub import ModuleBackbone
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import (
    Standardiser,
    TrainingSource,
    open_backbones,
    random_projection,
)
from featup_hub.weights import write


def test_a_projection_has_orthonormal_rows_and_follows_its_generator():
    matrix = random_projection(50, 7, seeded(1))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(7), atol=1e-5, rtol=0)
    assert torch.equal(matrix, random_projection(50, 7, seeded(1)))
    with pytest.raises(ValueError, match="more directions than channels, 3; got 5; lower"):
        random_projection(3, 5, seeded(1))


def test_standardised_channels_have_mean_zero_and_deviation_one():
    features = torch.randn(4, 5, 6, 7) * torch.tensor([1e-3, 1, 50, 3, 2])[:, None, None] + 9
    standardiser = Standardiser(5)
    standardiser.fit(features)
    out = standardiser(features).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std(1)[1:], torch.ones(4), atol=1e-3, rtol=0)
    assert out.std(1)[0] < 0.1  # a channel that hardly moves is not blown up


def test_a_backbone_of_one_size_is_refused():
    pool = torch.nn.AvgPool2d(16)
    backbone = ModuleBackbone(pool, feat_dim=3, patch_size=16, fixed_size=(32, 32))
    with pytest.raises(ValueError, match=r"sees every image at \(32, 32\); use one that takes any"):
        TrainingSource(backbone)


def test_backbones_are_opened_by_name_or_given(stem):
    (lite,) = open_backbones(("efficientnet_lite0_stride32",)).values()
    assert (lite.patch_size, lite.feat_dim) == (32, 320)
    assert list(open_backbones(("a",), {"a": stem, "b": stem})) == ["a"]
    with pytest.raises(ValueError, match="at least one backbone; name one"):
        open_backbones(())
    with pytest.raises(ValueError, match="there is none for b; add it"):
        open_backbones(("a", "b"), {"a": stem})
    with pytest.raises(TypeError, match=r"a featup_hub.Backbone; got Conv2d; .* ModuleBackbone"):
        open_backbones(("a",), {"a": nn.Conv2d(3, 4, 8, stride=8)})
    with pytest.raises(ValueError, match=r"got 'jbu', an upsampler alone; .* name another"):
        open_backbones(("jbu",))


def test_all_names_and_files_are_checked_before_one_is_loaded(monkeypatch):
    def load_backbone(*_, **__):
        raise AssertionError("a backbone is loaded")

    monkeypatch.setattr("featup_hub.training.training_source.load_backbone", load_backbone)
    with pytest.raises(ValueError, match="got 'efficientnet_lite'"):
        open_backbones(("efficientnet_lite0", "efficientnet_lite"))
    with pytest.raises(FileNotFoundError, match=r"no weights file missing\.safetensors"):
        open_backbones(("efficientnet_lite0", "dinov2=missing.safetensors"))


def test_a_timm_model_takes_its_weights_from_a_file(tmp_path):
    model = timm.create_model("test_vit", dynamic_img_size=True)
    write({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    name = f"test_vit={tmp_path / 'w.safetensors'}"
    backbone = open_backbones((name,))[name].eval()
    assert next(backbone.parameters()).dtype == torch.float32
    assert backbone(torch.zeros(1, 3, 64, 64)).shape[-2:] == (4, 4)
