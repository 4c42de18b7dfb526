"""The recipes: short, and run with the real libraries and random weights."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from featup_hub import JBUStack, ModuleBackbone, UpsampledBackbone, load
from featup_hub.image import preprocess, read_image
from featup_hub.weights import read

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
MADE = {
    "torchvision_deeplab": ("torchvision", "logits", (1, 21, 64, 96)),
    "smp_encoder": ("segmentation_models_pytorch", "logits", (1, 2, 64, 96)),
    "transformers_clip": ("transformers", "features", (1, 24, 64, 96)),
    "transformers_dinov2": ("transformers", "features", (1, 24, 64, 96)),
    "transformers_dinov3": ("transformers", "features", (1, 24, 64, 96)),
    "transformers_siglip": ("transformers", "features", (1, 24, 64, 96)),
    "transformers_vit": ("transformers", "features", (1, 24, 64, 96)),
    "torchvision_fpn": ("torchvision", "maps", None),
    "mmseg_neck": ("mmengine", "JBUNeck", None),
    "ray_extract": ("ray", "extract", None),
}


def run(name: str, library: str) -> dict[str, object]:
    pytest.importorskip(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about themselves
        return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", [name for name, row in MADE.items() if row[2]])
def test_a_recipe_makes_what_it_says(name):
    library, variable, shape = MADE[name]
    made = run(name, library)[variable]
    assert made.shape == shape
    assert made.isfinite().all()
    assert made.std() > 0


def test_the_pyramids_finest_level_has_the_images_size():
    maps = run("torchvision_fpn", "torchvision")["maps"]
    sizes = [(32, 64 >> level, 96 >> level) for level in range(5)]
    assert [tuple(level.shape[1:]) for level in maps.values()] == sizes


def test_a_model_answers_as_timms_feature_extractors_do():
    backbone = ModuleBackbone(nn.Conv2d(3, 5, 8, stride=8), feat_dim=5, patch_size=8)
    model = UpsampledBackbone(backbone, JBUStack()).eval()
    image = torch.randn(2, 3, 24, 32)
    assert model.num_features == 5
    assert model.feature_info == [{"num_chs": 5, "reduction": 1, "module": "upsampler"}]
    with torch.no_grad():
        features = model(image)
        assert torch.equal(model.forward_features(image), features)
        assert torch.equal(model.fold_head(nn.Conv2d(5, 2, 1)).forward_features(image), features)


def test_mmsegmentations_registry_builds_the_neck_and_it_upsamples_the_last_level():
    neck_class = run("mmseg_neck", "mmengine")["JBUNeck"]
    from mmengine.registry import MODELS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        neck = MODELS.build({"type": "JBUNeck", "pretrained": False})
        neck.init_weights()
    assert type(neck) is neck_class
    image, levels = torch.randn(1, 3, 32, 48), (torch.randn(1, 4, 8, 12), torch.randn(1, 5, 2, 3))
    with torch.no_grad():
        first, last = neck((image, *levels))
        assert torch.equal(first, levels[0])
        assert torch.equal(last, neck.upsampler(levels[1], image))
    assert last.shape == (1, 5, 32, 48)


@pytest.mark.slow
def test_ray_extracts_a_folder_with_two_actors_and_goes_on_after_a_stop(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "photos").mkdir()
    for n in range(10):
        Image.new("RGB", (64, 48), (25 * n, 90, 200)).save(tmp_path / f"photos/{n}.jpg")
    out = tmp_path / "out"
    code = f"""if True:
        import sys
        from pathlib import Path
        import ray
        sys.path.insert(0, {str(FOLDER)!r})
        from ray_extract import extract
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        photos, out = Path({str(tmp_path / "photos")!r}), Path({str(out)!r})
        made = [extract(photos, out)]
        before = {{p: p.stat().st_mtime_ns for p in out.iterdir()}}
        for name in ("3.jpg.safetensors", "7.jpg.safetensors"):
            before.pop(out / name)
            (out / name).unlink()
        made += [extract(photos, out), extract(photos, out)]
        assert all(p.stat().st_mtime_ns == time for p, time in before.items())
        print(made)
    """
    path = os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER)])  # for the actors, too
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    quiet["RAY_worker_niceness"] = "0"  # else actors get no CPU on a busy machine
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **quiet, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[10, 2, 0]"
    assert sorted(p.name for p in out.iterdir()) == [f"{n}.jpg.safetensors" for n in range(10)]
    model = load("efficientnet_lite0")
    size = {"mean": model.mean, "std": model.std, "multiple_of": model.patch_size}
    with torch.inference_mode():
        expected = model(preprocess(read_image(tmp_path / "photos/7.jpg"), 224, **size))[0]
    found = read(out / "7.jpg.safetensors")["features"]
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_every_recipe_is_run_and_has_at_most_twenty_lines():
    files = {path.stem: path for path in FOLDER.glob("*.py")}
    assert set(files) == set(MADE)
    for path in files.values():
        lines = len(path.read_text().splitlines())
        assert lines <= {"ray_extract": 45}.get(path.stem, 20)
