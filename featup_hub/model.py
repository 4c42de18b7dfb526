"""A backbone and an upsampler as one module, and how to get a pretrained one by its name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from featup_hub.backbones import (
    Backbone,
    ChannelNorm,
    ClipBackbone,
    MaskClipBackbone,
    ShiftAndStitch,
    TimmBackbone,
    is_timm_model,
    timm_card,
)
from featup_hub.ops import Implementation
from featup_hub.registry import JBU_UNIVERSAL, MODELS, ModelCard, WeightFile, card
from featup_hub.upsamplers import FoldedHead, JBUStack
from featup_hub.weights import load as load_weights
from featup_hub.weights import load_into, split_norm

__all__ = [
    "UpsampledBackbone",
    "find_card",
    "list_models",
    "load",
    "load_backbone",
    "load_upsampler",
]


class UpsampledBackbone(nn.Module):
    """An image in, its features at the image's own resolution out.

    Args:
        backbone: What looks at the image.
        upsampler: What brings the features to its resolution.
        norm: Normalises the source in between, as upstream's ``use_norm`` does.

    Attributes:
        mean: Normalisation of images, ImageNet's for every model.
        std: Divisor of the same normalisation.
        patch_size: Stride of the source in pixels.
        feat_dim: Channels of the features.

    Raises:
        TypeError: If ``backbone`` is not a :class:`~featup_hub.backbones.Backbone`.
        ValueError: If the upsampler was made for another number of channels.

    Example:
        >>> from featup_hub import ModuleBackbone
        >>> cnn = ModuleBackbone(nn.Conv2d(3, 8, 16, stride=16), feat_dim=8, patch_size=16)
        >>> model = UpsampledBackbone(cnn, JBUStack()).eval()
        >>> model(torch.randn(1, 3, 64, 75)).shape
        torch.Size([1, 8, 64, 75])
    """

    def __init__(
        self,
        backbone: Backbone,
        upsampler: JBUStack | FoldedHead,
        *,
        norm: ChannelNorm | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"a backbone must be a featup_hub.Backbone; got {type(backbone).__name__}; "
                "wrap it: ModuleBackbone(module, feat_dim=..., patch_size=...)"
            )
        stack = upsampler.upsampler if isinstance(upsampler, FoldedHead) else upsampler
        if stack.feat_dim not in (None, backbone.feat_dim):
            raise ValueError(
                f"the upsampler was made for {stack.feat_dim} channels; the backbone has "
                f"{backbone.feat_dim}; use one made for it, or JBUStack(feat_dim=None)"
            )
        self.backbone = backbone
        self.norm = norm
        self.upsampler = upsampler
        self.mean, self.std = backbone.mean, backbone.std
        self.patch_size, self.feat_dim = backbone.patch_size, backbone.feat_dim

    def source(self, image: Tensor) -> Tensor:
        """Returns the features before upsampling.

        Args:
            image: RGB normalised by ``mean`` and ``std``, any size, (B, 3, H, W).

        Returns:
            Features, (B, C, ceil(H/p), ceil(W/p)) with p the patch size.
        """
        source: Tensor = self.backbone(image)
        return source if self.norm is None else self.norm(source)

    def forward(
        self,
        image: Tensor,
        *,
        size: tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Returns the features of an image at its own resolution.

        Args:
            image: RGB normalised by ``mean`` and ``std``, any size, (B, 3, H, W).
            size: Height and width wanted; default: the image's own.
            impl: Who computes, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, H, W).

        Raises:
            ValueError: If ``image`` is not (B, 3, H, W), or ``size`` below the source's.
        """
        return self.upsampler(self.source(image), image, size=size, impl=impl)

    @property
    def num_features(self) -> int:
        """Channels of the features, as timm's models call them."""
        return self.feat_dim

    @property
    def feature_info(self) -> list[dict[str, int | str]]:
        """Channels and stride of the features, as timm's models tell them."""
        return [{"num_chs": self.feat_dim, "reduction": 1, "module": "upsampler"}]

    def forward_features(self, image: Tensor) -> Tensor:
        """Returns the features without a head, as timm's models do, (B, C, H, W)."""
        upsampler = self.upsampler
        stack = upsampler.upsampler if isinstance(upsampler, FoldedHead) else upsampler
        return stack(self.source(image), image)

    def fold_head(self, head: nn.Conv2d) -> UpsampledBackbone:
        """Joins a linear head behind this model, exactly, at the cost of its few channels.

        Args:
            head: A 1×1 convolution from C features to K outputs.

        Returns:
            A model that returns (B, K, H, W) and shares its parameters with this one and the
            head.

        Raises:
            ValueError: If the head is no plain 1×1 convolution, or there is one already.
        """
        if isinstance(self.upsampler, FoldedHead):
            raise ValueError("this model has a head already; fold one into the model it came from")
        folded = UpsampledBackbone(self.backbone, self.upsampler.fold_head(head), norm=self.norm)
        return folded.train(self.training)


def list_models() -> list[str]:
    """Returns the names that :func:`load` takes; any model of timm comes beside them."""
    return [name for name, row in MODELS.items() if row.backbone is not None]


def find_card(name: str) -> ModelCard:
    """Returns what is known of a model, be it of the table or of timm.

    Args:
        name: A name of the table, or of timm's, with or without ``timm/`` before it. Names that
            both have are the table's, unless ``timm/`` says otherwise.

    Raises:
        ValueError: If there is no such model.
    """
    timm_name = name.removeprefix("timm/")
    if timm_name != name or (name not in MODELS and is_timm_model(name)):
        return timm_card(timm_name)
    return card(name)


def load(
    name: str,
    *,
    pretrained: bool = True,
    use_norm: bool = True,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    looks: int = 1,
) -> UpsampledBackbone:
    """Loads a model by its name, on the CPU, in evaluation mode.

    Nothing random is left in a pretrained model, and the global random state stays as it is.
    With ``pretrained=False`` random weights are drawn from it, as everywhere in PyTorch.

    Args:
        name: One of :func:`list_models`, or any name of timm's.
        pretrained: Whether to load the files that the model's card names.
        use_norm: Whether every position's vector is normalised before upsampling.
        weights: A file of your own for the upsampler, read in any case; or the name of one that
            is shipped: ``jbu_denoise``, the default, or ``jbu_faithful``, which does not
            average cells that look alike.
        backbone_weights: A file of your own for the backbone, laid out as timm's.
        looks: Passes of the backbone over shifted images, 1, 4, 9 and so on; see
            :class:`~featup_hub.backbones.ShiftAndStitch`.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such model, a file is damaged or does not fit, or ``looks`` is
            no square number or does not fit the backbone's stride.
        FileNotFoundError: If a file of your own does not exist.
        RuntimeError: If a file is nowhere to be had: not shipped, not cached, no connection.

    Example:
        >>> model = load("efficientnet_lite0", pretrained=False)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 112, 64, 96])
    """
    row = _card_with_backbone(name)[0]
    looks_per_side = math.isqrt(max(looks, 0))
    if looks < 1 or looks_per_side**2 != looks:
        raise ValueError(f"looks must be a square number, such as 1 or 4; got {looks}")
    with _undisturbed(pretrained):
        # The small file first: what fails should fail before a large download.
        upsampler, norm = _read_upsampler(row.upsampler_file, pretrained, weights)
        origin = weights or row.upsampler_file.filename
        if norm is not None and not use_norm:
            raise ValueError(
                f"{origin} was trained behind a channel norm, which it holds; got use_norm=False; "
                "leave it at True"
            )
        if norm is None and use_norm and upsampler.feat_dim is not None:
            raise ValueError(
                f"{origin} was trained for one backbone without a channel norm; got "
                "use_norm=True; pass use_norm=False"
            )
        backbone = load_backbone(name, pretrained=pretrained, weights=backbone_weights)
        if looks > 1:
            backbone = ShiftAndStitch(backbone, looks_per_side)
        model = UpsampledBackbone(
            backbone, upsampler, norm=ChannelNorm(backbone.feat_dim) if use_norm else None
        )
        if norm is not None and model.norm is not None:
            load_into(model.norm, norm, origin=origin)
    return model.eval()


def load_backbone(
    name: str, *, pretrained: bool = True, weights: str | Path | None = None
) -> Backbone:
    """Loads a model's backbone alone, see :func:`load`.

    Args:
        name: One of :func:`list_models`, or any name of timm's.
        pretrained: Whether to load the file that the model's card names.
        weights: A file of your own, laid out as timm's, read in any case.

    Returns:
        The backbone, on the CPU, in evaluation mode.
    """
    row, architecture, file = _card_with_backbone(name)
    with _undisturbed(pretrained):
        read = pretrained or weights is not None
        tensors = load_weights(file, path=weights) if read else None
        backbone: Backbone
        if row.kind == "clip":
            backbone = ClipBackbone(architecture, weights=tensors)
        elif row.kind == "maskclip":
            backbone = MaskClipBackbone(architecture, weights=tensors)
        else:
            backbone = TimmBackbone(architecture, weights=tensors, stride=row.patch_size)
    return backbone.eval()


def load_upsampler(*, pretrained: bool = True, weights: str | Path | None = None) -> JBUStack:
    """Loads the upsampler alone, for features of your own.

    Args:
        pretrained: Whether to load the stages that come with the package, which fit any number
            of channels.
        weights: A file of your own, read in any case; or the name of one that is shipped, see
            :func:`load`.

    Returns:
        The upsampler ``(source, guidance) -> features``, on the CPU, in evaluation mode. Its
        guidance is an image normalised as ImageNet's.

    Raises:
        ValueError: If the file is damaged, does not fit, or holds a channel norm, too.
        FileNotFoundError: If a file of your own does not exist.

    Example:
        >>> upsampler = load_upsampler(pretrained=False)
        >>> upsampler(torch.randn(1, 5, 4, 6), torch.randn(1, 3, 56, 84)).shape
        torch.Size([1, 5, 56, 84])
    """
    with _undisturbed(pretrained):
        upsampler, norm = _read_upsampler(JBU_UNIVERSAL, pretrained, weights)
    if norm is not None:
        raise ValueError(
            f"{weights} holds a channel norm, which belongs behind its backbone; "
            "load both: load(NAME, weights=...)"
        )
    return upsampler.eval()


def _card_with_backbone(name: str) -> tuple[ModelCard, str, WeightFile]:
    """Returns a card, and what its backbone is called and loaded from."""
    row = find_card(name)
    if row.backbone is None or row.backbone_file is None:
        raise ValueError(
            f"a model with a backbone is needed; got {name!r}, an upsampler alone; "
            "call load_upsampler(), or name another model"
        )
    return row, row.backbone, row.backbone_file


def _read_upsampler(
    file: WeightFile, pretrained: bool, path: str | Path | None
) -> tuple[JBUStack, dict[str, Tensor] | None]:
    """Builds an upsampler and returns it with the tensors of the norm that came with it."""
    if not pretrained and path is None:
        return JBUStack(joint_first=True, unit_sum=True), None
    tensors, norm = split_norm(load_weights(file, path=path))
    upsampler = JBUStack.fitting(tensors)
    load_into(upsampler, tensors, origin=path or file.filename)
    return upsampler, norm


@contextmanager
def _undisturbed(pretrained: bool) -> Iterator[None]:
    """Builds on the CPU; what is drawn only to be overwritten leaves no trace."""
    with torch.random.fork_rng(devices=[], enabled=pretrained), torch.device("cpu"):
        yield
