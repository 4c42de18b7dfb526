"""The recipes: short, and run with the real libraries and random weights."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from featup_hub import JBUStack, ModuleBackbone, UpsampledBackbone

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
MADE = {
    "torchvision_deeplab": ("torchvision", "logits", (1, 21, 64, 96)),
    "smp_encoder": ("segmentation_models_pytorch", "logits", (1, 2, 64, 96)),
    "transformers_dinov2": ("transformers", "features", (1, 24, 64, 96)),
    "transformers_siglip": ("transformers", "features", (1, 24, 64, 96)),
    "transformers_vit": ("transformers", "features", (1, 24, 64, 96)),
    "torchvision_fpn": ("torchvision", "maps", None),
}


def run(name: str, library: str) -> dict[str, object]:
    pytest.importorskip(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about themselves
        return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", [name for name, row in MADE.items() if row[2]])
def test_a_recipe_makes_what_it_says(name: str) -> None:
    library, variable, shape = MADE[name]
    made = run(name, library)[variable]
    assert made.shape == shape
    assert made.isfinite().all()
    assert made.std() > 0


def test_the_pyramids_finest_level_has_the_images_size() -> None:
    maps = run("torchvision_fpn", "torchvision")["maps"]
    assert [tuple(level.shape[1:]) for level in maps.values()] == [
        (32, 64, 96),
        (32, 32, 48),
        (32, 16, 24),
        (32, 8, 12),
        (32, 4, 6),
    ]


def test_a_model_answers_as_timms_feature_extractors_do() -> None:
    backbone = ModuleBackbone(nn.Conv2d(3, 5, 8, stride=8), feat_dim=5, patch_size=8)
    model = UpsampledBackbone(backbone, JBUStack()).eval()
    image = torch.randn(2, 3, 24, 32)
    assert model.num_features == 5
    assert model.feature_info == [{"num_chs": 5, "reduction": 1, "module": "upsampler"}]
    with torch.no_grad():
        features = model(image)
        assert torch.equal(model.forward_features(image), features)
        assert torch.equal(model.fold_head(nn.Conv2d(5, 2, 1)).forward_features(image), features)


def test_every_recipe_is_run_and_has_at_most_twenty_lines() -> None:
    files = {path.stem: path for path in FOLDER.glob("*.py")}
    assert set(files) == set(MADE)
    for path in files.values():
        assert len(path.read_text().splitlines()) <= 20
