"""Any network of timm with ``forward_intermediates``: ViTs, CNNs and hybrids.

timm finds, downloads and converts its own weights. ``docs/families.md`` lists the families of
networks.

Source: the timm library (Apache-2.0), 1.0.9 or newer; DINOv3 and SigLIP 2 need newer ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.backbones.contract import Backbone
from featup_hub.backbones.timm_network import build, create


class TimmBackbone(Backbone):
    """A network of timm as a backbone.

    Class and register tokens are left out. Position embeddings are resampled to the image's size,
    square or not. By default the features are the deepest, normalised by the network's own closing
    norm if it has a suitable one. Later layers are removed.

    Args:
        name: A timm name, with or without a tag of weights, or ``hf-hub:owner/name``.
        pretrained: Whether timm loads the weights of that name; otherwise they are random.
        weights: Weights of your own instead: a file, or tensors by name. Names and shapes may be
            timm's or the authors', with any number of classes, or none.
        layer: Index into the network's intermediate features: blocks of a ViT, stages of a CNN.
        stride: Takes the deepest features with this stride instead, in pixels.
        norm: Whether the closing norm is applied.
        backbone_kwargs: Arguments for ``timm.create_model``, such as ``{"img_size": 448}`` or
            ``{"in_chans": 13}``.

    Example:
        >>> import torch
        >>> backbone = TimmBackbone("tf_efficientnet_lite0", stride=16).eval()
        >>> backbone(torch.randn(1, 3, 64, 90)).shape
        torch.Size([1, 112, 4, 6])
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: Mapping[str, Tensor] | str | Path | None = None,
        layer: int | None = None,
        stride: int | None = None,
        norm: bool = True,
        backbone_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        kwargs = dict(backbone_kwargs or {})
        model = create(name, pretrained=pretrained, weights=weights, backbone_kwargs=kwargs)
        index, feat_dim, patch_size = _choose_layer(name, model, layer, stride)
        # Some networks without a closing norm refuse the argument.
        norm = norm and any("norm" in child for child, _ in model.named_children())
        self._options = {"norm": norm, "stop_early": True, "intermediates_only": True}
        in_chans = int(kwargs.get("in_chans") or model.pretrained_cfg["input_size"][0])
        geometry = _find_geometry(name, model, kwargs, patch_size, in_chans, [index], self._options)
        super().__init__(
            feat_dim=geometry.feat_dim or feat_dim,
            patch_size=patch_size,
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
            in_chans=in_chans,
            fixed_size=geometry.fixed_size,
        )
        model.prune_intermediate_layers([index], prune_norm=not norm)
        self.name = name
        self.model = model
        self.layer = index
        self._padding = geometry.padding

    def features(self, image: Tensor) -> Tensor:
        """Computes the chosen intermediate features."""
        if self._padding:
            before, after = self._padding // 2, self._padding - self._padding // 2
            image = F.pad(image, (before, after, before, after), mode="replicate")
        (features,) = self.model.forward_intermediates(image, indices=[self.layer], **self._options)
        if features.shape[1] != self.feat_dim:  # old versions of timm count some layers differently
            raise RuntimeError(
                f"timm announces {self.feat_dim} channels in layer {self.layer} of {self.name}; "
                f"got {features.shape[1]}; upgrade it: pip install --upgrade timm"
            )
        return features


def _choose_layer(
    name: str, model: Any, layer: int | None, stride: int | None
) -> tuple[int, int, int]:
    """Returns index, channels and stride of the chosen features."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"timm's {name} does not offer intermediate features; wrap it in "
            "featup_hub.ModuleBackbone with a call of your own"
        )
    levels = [(level["num_chs"], level["reduction"]) for level in model.feature_info]
    if layer is not None and stride is not None:
        raise ValueError(f"choose features by layer or by stride; got {layer=} and {stride=}")
    if stride is not None:
        indices = [i for i, (_, reduction) in enumerate(levels) if reduction == stride]
        if not indices:
            offered = sorted({reduction for _, reduction in levels})
            raise ValueError(f"timm's {name} has features of strides {offered}; got {stride=}")
        layer = indices[-1]
    layer = -1 if layer is None else layer
    if not (isinstance(layer, Integral) and -len(levels) <= layer < len(levels)):
        raise ValueError(f"timm's {name} has layers 0 to {len(levels) - 1}; got {layer=}")
    return layer % len(levels), *levels[layer]


class Geometry(NamedTuple):
    """How a network's features lie on its image."""

    feat_dim: int | None = None  # channels; None if they are those that timm announces
    fixed_size: tuple[int, int] | None = None  # the only size of image; None if it takes any
    padding: int = 0  # pixels to add to each axis, in total, so that features cover the image


def _find_geometry(
    name: str,
    model: Any,
    kwargs: Mapping[str, Any],
    patch: int,
    in_chans: int,
    indices: list[int],
    options: Mapping[str, Any],
) -> Geometry:
    """Finds the geometry of the features with a copy of the network on the meta device."""
    config = model.pretrained_cfg
    dynamic = getattr(model, "dynamic_img_size", False) and not hasattr(model, "neck")
    if dynamic or not (
        config.get("fixed_input_size")
        or config.get("min_input_size")
        or any(map(_loses_edges, model.modules()))
    ):
        return Geometry()
    with torch.device("meta"):
        twin = build(name, kwargs).eval()

    def shape(height: int, width: int) -> tuple[int, ...] | None:
        """Returns (C, h, w) of the features; None if the network refuses the size."""
        try:
            with torch.device("meta"), torch.no_grad():
                image = torch.empty(1, in_chans, height, width)
                features = twin.forward_intermediates(image, indices=indices, **options)[0]
                return tuple(features.shape[1:])
        except (AssertionError, RuntimeError, ValueError):
            return None

    # MViTv2 reads beside its tables of relative positions at another size than theirs.
    fixed = type(model).__name__ == "MultiScaleVit"
    probe = None if fixed else shape(5 * patch, 7 * patch)
    if probe and probe[1:] == (5, 7):
        return Geometry(probe[0])
    if probe and probe[1] < 5 and probe[2] < 7:
        # Convolutions without padding: the least padding that completes the grid also centres it.
        padding = bisect_left(
            range(4 * patch),
            True,
            key=lambda more: (shape(5 * patch + more, 7 * patch + more) or (0, 0, 0))[1] >= 5,
        )
        if (shape(9 * patch + padding, 6 * patch + padding) or ())[1:] == (9, 6):
            return Geometry(probe[0], padding=padding)
    native = kwargs.get("img_size", config["input_size"][1:])
    native = (native, native) if isinstance(native, int) else (int(native[0]), int(native[1]))
    own = shape(*native)
    return Geometry(own[0], fixed_size=native) if own else Geometry()


def _loses_edges(module: nn.Module) -> bool:
    """Returns whether a layer's outputs do not reach the image's edge."""
    if type(module) not in (nn.Conv2d, nn.MaxPool2d):  # TensorFlow's layers pad by themselves
        return False
    layer: Any = module
    kernel, stride, padding = (
        value if isinstance(value, int) else max(value)
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    return bool(kernel > stride and padding == 0)
