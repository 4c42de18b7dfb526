"""Any network of timm that offers ``forward_intermediates``: ViTs, CNNs and what lies between.

Source: the timm library (Apache-2.0), 1.0.9 or newer; DINOv3 and SigLIP 2 need newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from featup_hub.backbones.contract import Backbone
from featup_hub.registry import JBU_UNIVERSAL, ModelCard, WeightFile
from featup_hub.weights.files import listed

__all__ = ["TimmBackbone", "create", "is_timm_model", "timm_card"]


class TimmBackbone(Backbone):
    """A network of timm as a backbone.

    Class and register tokens are left out, position embeddings follow the image's size, square
    or not. Which features: by default the deepest there are, normalised by the network's own
    closing norm where it has one that fits. What lies behind them is removed.

    Args:
        name: A name of timm's, with or without a tag of weights.
        weights: What the file of that name on the Hub holds; None draws random weights.
        layer: Index into the network's intermediate features: blocks of a ViT, stages of a CNN.
        stride: Takes the deepest features with this stride instead, in pixels.
        norm: Whether the closing norm is applied.

    Example:
        >>> import torch
        >>> backbone = TimmBackbone("tf_efficientnet_lite0", stride=16).eval()
        >>> backbone(torch.randn(1, 3, 64, 90)).shape
        torch.Size([1, 112, 4, 6])

    Raises:
        ValueError: If timm has no such network, or the network no such layer or stride, or the
            weights do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Mapping[str, Tensor] | None = None,
        layer: int | None = None,
        stride: int | None = None,
        norm: bool = True,
    ) -> None:
        model, fixed_size = create(name, weights)
        index, feat_dim, patch_size = _choose(name, model, layer, stride)
        super().__init__(
            feat_dim=feat_dim,
            patch_size=patch_size,
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
        )
        model.prune_intermediate_layers([index], prune_norm=not norm)
        self.name = name
        self.model = model
        self.layer = index
        # Some networks without a closing norm refuse to be asked for one.
        self.norm = norm and any("norm" in child for child, _ in model.named_children())
        self.fixed_size = fixed_size

    def features(self, image: Tensor) -> Tensor:
        """Computes the chosen intermediate features."""
        size = tuple(image.shape[-2:])
        try:
            (features,) = self.model.forward_intermediates(
                image,
                indices=[self.layer],
                norm=self.norm,
                stop_early=True,
                intermediates_only=True,
            )
        except (AssertionError, RuntimeError) as error:
            if self.fixed_size in (None, size):
                raise
            # Not known beforehand: some networks that are said to have one size take others.
            raise ValueError(
                f"timm's {self.name} is made for images of {self.fixed_size} pixels; got {size}, "
                f"and it failed ({error}); resize them or choose another network"
            ) from error
        if features.shape[1] != self.feat_dim:  # old versions of timm count some layers otherwise
            raise RuntimeError(
                f"timm announces {self.feat_dim} channels in layer {self.layer} of {self.name}; "
                f"got {features.shape[1]}; upgrade it: pip install --upgrade timm"
            )
        return features


def is_timm_model(name: str) -> bool:
    """Tells whether timm has a network of this name, with or without a tag of weights."""
    import timm

    return timm.is_model(name.split(".")[0])


def timm_card(name: str) -> ModelCard:
    """Makes a card for any network of timm, from what timm knows of it.

    Args:
        name: A name of timm's; without a tag, timm's default weights.

    Returns:
        A card with the deepest features and, where timm has weights, where they are.

    Raises:
        ValueError: If timm has no such network.
    """
    config = _config(name)
    return ModelCard(
        name=f"timm/{name}",
        backbone=name,
        feat_dim=None,
        patch_size=None,
        image_size=config.input_size[-1],
        backbone_file=WeightFile(
            name=name,
            filename=config.hf_hub_filename or "model.safetensors",
            repo_id=config.hf_hub_id,
            licence=config.license or "not stated by timm",
            data="see its page on the Hugging Face Hub",
        ),
        upsampler_file=JBU_UNIVERSAL,
    )


def create(name: str, weights: Mapping[str, Tensor] | None) -> tuple[Any, tuple[int, int] | None]:
    """Builds a network of timm, with weights loaded strictly if given.

    timm itself loads them, so its own conversions apply, such as resampled position embeddings.

    Returns:
        The network, and the image size it is made for, None where any will do.
    """
    import timm

    _config(name)
    options: dict[str, Any] = {}
    if weights is not None:
        options = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(weights)}}
    fixed_size = None
    try:
        try:
            model: Any = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            model = timm.create_model(name, **options)
            if model.pretrained_cfg.get("fixed_input_size"):
                fixed_size = tuple(model.pretrained_cfg["input_size"][1:])
    except (RuntimeError, KeyError) as error:
        if weights is None:
            raise
        raise ValueError(
            f"these weights are not those of timm's {name}: {_problems(error)}; "
            "check that file and network belong together"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # else timm's copy lives as long as the model
    return model, fixed_size


def _problems(error: Exception) -> str:
    """Says what PyTorch found not to fit, without its lists of hundreds of names."""
    text = str(error)
    # From the text, for only timm knows which names and shapes its conversions end in.
    missing, unknown = (
        re.findall(r'"([^"]+)"', "".join(re.findall(rf"{which} key\(s\).*", text)))
        for which in ("Missing", "Unexpected")
    )
    shapes = r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)"
    differing = [f"{key} ({got}), needed ({due})" for key, got, due in re.findall(shapes, text)]
    problems = {"missing": missing, "not known here": unknown, "of another shape": differing}
    told = (f"{len(names)} {label}: {listed(names)}" for label, names in problems.items() if names)
    return "; ".join(told) or text


def _config(name: str) -> Any:
    """Returns what timm knows of a name, refusing unknown ones."""
    import timm

    architecture = name.split(".")[0]
    if not is_timm_model(name):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + "newer versions may have it: pip install --upgrade timm"
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        tagged = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise ValueError(
            f"timm {timm.__version__} has no weights {name!r}; it has {tagged or 'none'}"
        ) from None


def _choose(name: str, model: Any, layer: int | None, stride: int | None) -> tuple[int, int, int]:
    """Returns the index, the channels and the stride of the features to take."""
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
    if not -len(levels) <= layer < len(levels):
        raise ValueError(f"timm's {name} has layers 0 to {len(levels) - 1}; got {layer=}")
    return layer % len(levels), *levels[layer]
