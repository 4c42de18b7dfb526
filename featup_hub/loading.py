"""Lists and loads models by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featup_hub import backbones
from featup_hub.backbones.contract import Backbone, ChannelNorm
from featup_hub.model import UpsampledBackbone
from featup_hub.registry import ALIASES, MODELS, ModelCard
from featup_hub.upsamplers import JBUStack
from featup_hub.weights.files import existing, load_into, split_norm
from featup_hub.weights.files import load as load_weights


def list_models() -> list[str]:
    """Returns the names of the table; :func:`load` also takes any model of timm."""
    return [name for name, card in MODELS.items() if card.backbone]


def find_backbone(spec: str) -> tuple[ModelCard, Path | None]:
    """Returns the card and the file of ``NAME`` or ``NAME=FILE``, both known to exist.

    Raises as :func:`find_card`, and FileNotFoundError if there is no such file.
    """
    name, equals, file = spec.partition("=")
    if equals and not file:
        raise ValueError(f"a file must follow {spec!r}; give it, or leave the = out")
    return find_card(name), existing(file) if file else None


def find_card(name: str | ModelCard) -> ModelCard:
    """Returns the card of a model of the table or of timm.

    The prefix ``timm/`` selects timm's model if both have the name. A card is returned as it is.

    Raises:
        TypeError: If ``name`` is neither a string nor a card.
        ValueError: If there is no such model, or it has no backbone; the message suggests the
            nearest names.
    """
    if isinstance(name, ModelCard):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"a model is named by a string; got {type(name).__name__}; wrap a module of your own: "
            "UpsampledBackbone(ModuleBackbone(module, feat_dim=..., patch_size=...), "
            "load_upsampler())"
        )
    name = ALIASES.get(name, name)
    if name in MODELS:
        if not MODELS[name].backbone:
            raise ValueError(
                f"a model with a backbone is needed; got {name!r}, an upsampler alone; "
                "call load_upsampler(), or name another model"
            )
        return MODELS[name]
    if name.startswith("timm/") or backbones.is_timm_model(name):
        return backbones.timm_card(name.removeprefix("timm/"))
    known = {each.lower(): each for each in (*list_models(), *ALIASES)}
    near = [known[each] for each in get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is similar."
    if "=" in name:  # as the command line spells it
        model, _, file = name.partition("=")
        hint = f"give the file apart: load({model!r}, backbone_weights={file!r})."
    raise ValueError(
        f"a model must be one of the names below; got {name!r}; {hint}\n"
        f"  {', '.join(list_models())}\n"
        "  or any model of timm, such as 'convnext_tiny.fb_in1k'"
    )


def load(
    name: str | ModelCard,
    *,
    pretrained: bool = True,
    use_norm: bool = True,
    upsampler: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    layer: int | None = None,
    looks: int = 1,
    device: str | torch.device | None = None,
) -> UpsampledBackbone:
    """Loads a model by its name, in evaluation mode.

    A pretrained model does not change the global random state. ``pretrained=False`` draws random
    weights for the same architecture.

    Args:
        name: One of :func:`list_models`, any name of timm's, ``hf-hub:owner/name``, or the name
            that Meta gives one of its models.
        pretrained: Whether to load the weights that the model's card names.
        use_norm: Whether every position's vector is normalised before upsampling.
        upsampler: A shipped upsampler, a file of your own, or a folder of ``save_pretrained``.
            ``"jbu_denoise"``, the default, averages cells that look alike; ``"jbu_faithful"`` does
            not. What is given is read even if ``pretrained`` is False.
        backbone_weights: A file of your own for the backbone, see :func:`load_backbone`.
        backbone_kwargs: Arguments for ``timm.create_model``, such as ``{"img_size": 448}``.
        layer: Layer of the backbone's features, see :class:`~featup_hub.TimmBackbone`; default: the
            card's.
        looks: Passes of the backbone over shifted images, every second one mirrored: 1, 4 or the
            square of another divisor of its stride; see :class:`~featup_hub.ShiftAndStitch`.
        device: Where to put the model; default: the CPU.

    Raises:
        ValueError: If the model is unknown, a file is damaged or does not fit, this machine does
            not have ``device``, or ``looks`` is not the square of a divisor of the backbone's
            stride.
        FileNotFoundError: If a file of your own does not exist.
        RuntimeError: If a file is missing: not shipped, not cached, no connection.

    Example:
        >>> model = load("efficientnet_lite0", pretrained=False)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 112, 64, 96])
    """
    card = find_card(name)
    place = open_device(device)
    if not backbone_kwargs:  # which may change the stride
        stride_and_size(card, layer=layer, looks=looks)
    with _undisturbed(pretrained):
        # The small file first, so that its errors come before a large download.
        stack, norm = _read_upsampler(upsampler, pretrained)
        if norm is not None and not use_norm:
            raise ValueError(
                f"{upsampler} was trained behind a channel norm, which it holds; got "
                "use_norm=False; leave it at True (leave --no-norm out)"
            )
        if norm is None and use_norm and stack.feat_dim is not None:
            raise ValueError(
                f"{upsampler} was trained for one backbone without a channel norm; got "
                "use_norm=True; pass use_norm=False (give --no-norm)"
            )
        backbone = load_backbone(
            card,
            pretrained=pretrained,
            weights=backbone_weights,
            backbone_kwargs=backbone_kwargs,
            layer=layer,
        )
        if looks != 1:
            per_side = backbones.root_of_looks(looks, backbone.patch_size)
            backbone = backbones.ShiftAndStitch(backbone, per_side)
        model = UpsampledBackbone(
            backbone,
            stack,
            norm=ChannelNorm(backbone.feat_dim) if use_norm else None,
            image_size=nearest_multiple(card.image_size, backbone.patch_size),
        )
        if norm is not None and model.norm is not None:
            load_into(model.norm, norm, origin=str(upsampler))
    return model.to(place).eval()


def stride_and_size(card: ModelCard, *, layer: int | None, looks: int) -> tuple[int, int]:
    """Returns a model's stride and its default short side, in pixels, without its weights."""
    stride = card.patch_size if layer is None or card.kind != "timm" else None
    if stride is None:
        with torch.device("meta"):
            stride = backbones.TimmBackbone(card.backbone, layer=layer).patch_size
    stride //= backbones.root_of_looks(looks, stride)
    return stride, nearest_multiple(card.image_size, stride)


def nearest_multiple(side: float, stride: int) -> int:
    """Returns the multiple of the stride that is nearest to a side, at least one stride."""
    return max(round(side / stride), 1) * stride


def load_backbone(
    name: str | ModelCard,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    layer: int | None = None,
) -> Backbone:
    """Loads a model's backbone alone, on the CPU, in evaluation mode.

    Args:
        name: As for :func:`load`.
        pretrained: Whether to load the weights that the model's card names.
        weights: A file of your own, read even if ``pretrained`` is False. Names and shapes may be
            timm's or the authors', with any number of classes, or none.
        backbone_kwargs: Arguments for ``timm.create_model``, such as ``{"img_size": 448}``.
        layer: Layer of the features, see :class:`~featup_hub.TimmBackbone`; default: the card's.
    """
    card = find_card(name)
    if layer is not None and card.kind != "timm":
        raise ValueError(f"{card.name} has features of one layer only; got {layer=}; leave it out")
    with _undisturbed(pretrained):
        own = load_weights(card.file) if weights is None and pretrained and card.file else weights
        options: dict[str, Any] = {"weights": own, "backbone_kwargs": backbone_kwargs}
        options["pretrained"] = pretrained
        if card.kind != "timm":
            clip = backbones.ClipBackbone if card.kind == "clip" else backbones.MaskClipBackbone
            return clip(card.backbone, **options).eval()
        stride = card.patch_size if layer is None else None
        return backbones.TimmBackbone(card.backbone, layer=layer, stride=stride, **options).eval()


def load_upsampler(
    upsampler: str | Path | None = None,
    *,
    pretrained: bool = True,
    device: str | torch.device | None = None,
) -> JBUStack:
    """Loads the upsampler alone, for features of your own, in evaluation mode.

    Its guidance is an image normalised as ImageNet's.

    Args:
        upsampler: A shipped upsampler or a file of your own, see :func:`load`.
        pretrained: Whether to load the weights that come with the package, which fit any number
            of channels.
        device: Where to put it; default: the CPU.

    Raises:
        ValueError: If the file is damaged, does not fit, or also contains a channel norm.
        FileNotFoundError: If a file of your own does not exist.

    Example:
        >>> upsampler = load_upsampler(pretrained=False)
        >>> upsampler(torch.randn(1, 5, 4, 6), torch.randn(1, 3, 56, 84)).shape
        torch.Size([1, 5, 56, 84])
    """
    place = open_device(device)
    with _undisturbed(pretrained):
        stack, norm = _read_upsampler(upsampler, pretrained)
    if norm is not None:
        raise ValueError(
            f"{upsampler} holds a channel norm, which belongs behind its backbone; "
            "load both: load(NAME, upsampler=...)"
        )
    return stack.to(place).eval()


def open_device(device: str | torch.device | None) -> torch.device:
    """Returns a device after testing it; by default the CPU.

    Raises:
        ValueError: If it is not a device, or this machine does not have it.
    """
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu, cuda, cuda:1 or mps; got {device!r}") from error
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest is a list of backends
        raise ValueError(f"device {place} cannot be used here: {reason}; take cpu") from error


def _read_upsampler(
    source: str | Path | None, pretrained: bool
) -> tuple[JBUStack, dict[str, Tensor] | None]:
    """Builds an upsampler; returns it with the tensors of its norm."""
    if source is None and not pretrained:
        return JBUStack(joint_first=True, unit_sum=True), None
    source = "jbu_denoise" if source is None else source
    if not isinstance(source, (str, PathLike)):
        raise TypeError(
            f"upsampler must name a shipped upsampler or a file; got {type(source).__name__}; put "
            "a module behind a backbone: UpsampledBackbone(load_backbone(NAME), upsampler)"
        )
    tensors, norm = split_norm(load_weights(source))
    upsampler = JBUStack.fitting(tensors)
    load_into(upsampler, tensors, origin=source)
    return upsampler, norm


@contextmanager
def _undisturbed(pretrained: bool) -> Iterator[None]:
    """Builds on the CPU, without changing the random state if weights will be overwritten.

    Raises TypeError unless ``pretrained`` is True or False.
    """
    if pretrained not in (True, False):
        raise TypeError(
            f"pretrained must be True or False; got {pretrained!r}; a file of your own goes to "
            "backbone_weights= of load, weights= of load_backbone, or upsampler="
        )
    with torch.random.fork_rng(devices=[], enabled=pretrained), torch.device("cpu"):
        yield
