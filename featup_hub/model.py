"""A backbone and an upsampler as one module, and how to get a pretrained one by its name."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from featup_hub.image import preprocess
from featup_hub.ops import Implementation
from featup_hub.registry import ALIASES, JBU_UNIVERSAL, MODELS, ModelCard, WeightFile, card
from featup_hub.upsamplers import FoldedHead, JBUStack
from featup_hub.upsamplers.jbu import check_channels
from featup_hub.weights import load as load_weights
from featup_hub.weights import load_into, split_norm

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = [
    "UpsampledBackbone",
    "find_card",
    "list_models",
    "load",
    "load_backbone",
    "load_upsampler",
    "name_and_file",
]

_LARGEST = 20  # no normalisation in use leaves a value that large


class UpsampledBackbone(nn.Module):
    """An image in, its features at the image's own resolution out.

    Args:
        backbone: The network that turns the image into low-resolution features.
        upsampler: The module that brings these to the image's resolution.
        norm: Normalises the source in between, as upstream's ``use_norm`` does.
        image_size: Short side to which :meth:`preprocess` resizes an image by default, in pixels;
            None keeps the image's own size.

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
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"a backbone must be a featup_hub.Backbone; got {type(backbone).__name__}; "
                "wrap it: ModuleBackbone(module, feat_dim=..., patch_size=...)"
            )
        self.backbone = backbone
        self.norm = norm
        self.upsampler = _for_looks(upsampler, backbone.looks_per_side)
        self.image_size = image_size
        self.mean, self.std = backbone.mean, backbone.std
        self.patch_size, self.feat_dim = backbone.patch_size, backbone.feat_dim
        self._range_checked = False
        if self.stack.feat_dim not in (None, backbone.feat_dim):
            raise ValueError(
                f"the upsampler was made for {self.stack.feat_dim} channels; the backbone has "
                f"{backbone.feat_dim}; use one made for it, or JBUStack(feat_dim=None)"
            )

    @property
    def stack(self) -> JBUStack:
        """The upsampler without a head."""
        upsampler = self.upsampler
        return upsampler.upsampler if isinstance(upsampler, FoldedHead) else upsampler

    def preprocess(
        self,
        photo: str | Path | Image.Image | NDArray[Any],
        size: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """Turns a photograph into the tensor that this model takes, as the command line does.

        Args:
            photo: A file, a PIL image or an array (H, W, 3) of uint8; see
                :func:`featup_hub.read_image`.
            size: Length of the short side, or height and width, multiples of ``patch_size``;
                default: ``image_size``. See :func:`featup_hub.image.resize`.

        Returns:
            The normalised image, (1, 3, H, W), on the model's device and in its precision.

        Raises:
            OSError: If there is no such file, or it may not be read.
            ValueError: If the file is no image, or ``size`` is no multiple of ``patch_size``.
            TypeError: If ``photo`` is something else.

        Example:
            >>> import numpy as np
            >>> model = load("efficientnet_lite0")
            >>> model.preprocess(np.zeros((60, 90, 3), dtype=np.uint8), size=32).shape
            torch.Size([1, 3, 32, 48])
        """
        size = self.image_size if size is None else size
        image = preprocess(photo, size, mean=self.mean, std=self.std, multiple_of=self.patch_size)
        like = next((p for p in self.parameters() if p.is_floating_point()), image)
        return image.to(like.device, like.dtype)

    def source(self, image: Tensor) -> Tensor:
        """Returns the features before upsampling.

        Args:
            image: RGB normalised by ``mean`` and ``std``, any size, (B, 3, H, W).

        Returns:
            Features, (B, C, ceil(H/p), ceil(W/p)) with p the patch size.

        Raises:
            ValueError: If ``image`` is not (B, 3, H, W).
            TypeError: If it is no tensor, or its precision is not the model's.
        """
        if not isinstance(image, Tensor):
            raise TypeError(
                f"a model takes a normalised image as a tensor, (B, 3, H, W); got "
                f"{type(image).__name__}; call model(model.preprocess(photo))"
            )
        try:
            source: Tensor = self.backbone(image)
        except RuntimeError as error:
            dtypes = {p.dtype for p in self.backbone.parameters() if p.is_floating_point()}
            if len(dtypes) != 1 or image.dtype in dtypes:
                raise
            own = dtypes.pop()
            raise TypeError(
                f"this backbone needs images in its own precision, {own}; got {image.dtype}; "
                f"convert one of them: image.to({own}) or model.to({image.dtype})"
            ) from error
        return source if self.norm is None else self.norm(source)

    def forward(
        self,
        image: Tensor,
        *,
        guidance: Tensor | None = None,
        size: int | tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Returns the features of an image at its own resolution.

        Args:
            image: RGB normalised by ``mean`` and ``std``, any size, (B, 3, H, W); or what the
                backbone takes in its place, such as 13 bands.
            guidance: Normalised RGB that guides the upsampling, (B, 3, H, W); default: the image.
            size: Height and width wanted, or the length of the short side; default: those of the
                guidance.
            impl: Who computes, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, H, W).

        Raises:
            ValueError: If ``image`` is not (B, 3, H, W), ``size`` is below the source's, or a
                guidance is missing.
            TypeError: If ``image`` is no tensor, or its precision is not the model's.
        """
        return self._upsample(self.upsampler, image, guidance, size, impl)

    @property
    def num_features(self) -> int:
        """Channels of the features, as timm's models call them."""
        return self.feat_dim

    @property
    def feature_info(self) -> list[dict[str, int | str]]:
        """Channels and stride of the features, as timm's models tell them."""
        return [{"num_chs": self.feat_dim, "reduction": 1, "module": "upsampler"}]

    def forward_features(self, image: Tensor, *, guidance: Tensor | None = None) -> Tensor:
        """Returns the features without a head, as timm's models do, (B, C, H, W)."""
        return self._upsample(self.stack, image, guidance, None, "auto")

    def fold_head(self, head: nn.Module) -> UpsampledBackbone:
        """Joins a linear head behind this model, exactly, at the cost of its few channels.

        Args:
            head: An ``nn.Linear``, or a 1×1 ``nn.Conv2d``, from C features to K outputs.

        Returns:
            A model that returns (B, K, H, W) and shares its parameters with this one and the
            head.

        Raises:
            ValueError: If the head is of another kind or for another number of channels, or
                there is one already.
        """
        if isinstance(self.upsampler, FoldedHead):
            raise ValueError("this model has a head already; fold one into the model it came from")
        upsampler = self.upsampler.fold_head(head)
        check_channels(head, self.feat_dim)
        folded = UpsampledBackbone(
            self.backbone, upsampler, norm=self.norm, image_size=self.image_size
        )
        return folded.train(self.training)

    def _upsample(
        self,
        upsampler: nn.Module,
        image: Tensor,
        guidance: Tensor | None,
        size: int | tuple[int, int] | None,
        impl: Implementation,
    ) -> Tensor:
        if guidance is None:
            guidance = image
            channels = self.stack.guidance_dim
            if isinstance(image, Tensor) and image.dim() == 4 and image.shape[1] != channels:
                raise ValueError(
                    f"upsampling is guided by an image of {channels} channels; got one of "
                    f"{image.shape[1]}; pass RGB beside it: model(image, guidance=rgb)"
                )
        self._warn_unless_normalised(guidance)
        return cast(Tensor, upsampler(self.source(image), guidance, size=size, impl=impl))

    def _warn_unless_normalised(self, image: Tensor) -> None:
        """Warns if the first image looks like pixels: the features would be wrong in silence."""
        # Reading values would break tracing, vmap and the capture of CUDA graphs.
        if (
            self._range_checked
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined]
            or type(image) is not Tensor
            or image.is_meta
            or not image.is_floating_point()
            or not image.numel()
            or torch._C._functorch.is_functorch_wrapped_tensor(image)
            or (image.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return
        self._range_checked = True
        low, high = (float(value) for value in image.detach().aminmax())
        if high > _LARGEST or 0 <= low < high <= 1:
            warnings.warn(
                f"the image has values from {low:.3g} to {high:.3g}, which do not look normalised; "
                "use model.preprocess(photo), or bring the image to [0, 1], subtract model.mean "
                "and divide by model.std",
                stacklevel=4,
            )


def _for_looks(upsampler: JBUStack | FoldedHead, count: int) -> JBUStack | FoldedHead:
    """Tells an upsampler how many looks there are per side, in a copy that shares its parts."""
    stack = upsampler.upsampler if isinstance(upsampler, FoldedHead) else upsampler
    if stack.looks_per_side == count:
        return upsampler
    stack = copy.copy(stack)
    stack.looks_per_side = count
    return FoldedHead(stack, upsampler.head) if isinstance(upsampler, FoldedHead) else stack


def list_models() -> list[str]:
    """Returns the names that :func:`load` takes; any model of timm comes beside them."""
    return [name for name, row in MODELS.items() if row.backbone is not None]


def name_and_file(spec: str) -> tuple[str, str | None]:
    """Splits ``NAME`` or ``NAME=FILE``, as commands name a backbone and a file of its weights.

    Raises:
        ValueError: If no file follows the ``=``.

    Example:
        >>> name_and_file("dinov2"), name_and_file("dinov2=mine.safetensors")
        (('dinov2', None), ('dinov2', 'mine.safetensors'))
    """
    name, equals, file = spec.partition("=")
    if equals and not file:
        raise ValueError(f"a file must follow {spec!r}; give it, or leave the = out")
    return name, file or None


def find_card(name: str) -> ModelCard:
    """Returns what is known of a model, be it of the table or of timm.

    Args:
        name: A name of the table, or of timm's, with or without ``timm/`` before it. Names that
            both have are the table's, unless ``timm/`` says otherwise.

    Raises:
        TypeError: If ``name`` is no string.
        ValueError: If there is no such model.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"a model is named by a string; got {type(name).__name__}; wrap a module of your own: "
            "UpsampledBackbone(ModuleBackbone(module, feat_dim=..., patch_size=...), "
            "load_upsampler())"
        )
    name = ALIASES.get(name, name)
    timm_name = name.removeprefix("timm/")
    if timm_name != name or (name not in MODELS and is_timm_model(name)):
        return timm_card(timm_name)
    return card(name)


def load(
    name: str,
    *,
    pretrained: bool = True,
    use_norm: bool = True,
    upsampler: str | Path | None = None,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    layer: int | None = None,
    looks: int = 1,
    device: str | torch.device | None = None,
) -> UpsampledBackbone:
    """Loads a model by its name, in evaluation mode.

    A pretrained model has no random weights, and the global random state stays as it is. With
    ``pretrained=False`` weights are drawn from it, and the architecture is the same.

    Args:
        name: One of :func:`list_models`, any name of timm's, ``hf-hub:owner/name``, or the name
            that Meta gives one of its models.
        pretrained: Whether to load the weights that the model's card names.
        use_norm: Whether every position's vector is normalised before upsampling.
        upsampler: A shipped upsampler, ``"jbu_denoise"``, the default, which averages cells that
            look alike, or ``"jbu_faithful"``, which does not; or a file of your own. It is read
            even if ``pretrained`` is False.
        weights: Former name of ``upsampler``.
        backbone_weights: A file of your own for the backbone, see :func:`load_backbone`.
        backbone_kwargs: Arguments for ``timm.create_model``, such as ``{"img_size": 448}``.
        layer: Which features of the backbone, see :class:`~featup_hub.TimmBackbone`; default:
            the card's.
        looks: Passes of the backbone over shifted images, 1, 4, 9 and so on; see
            :class:`~featup_hub.ShiftAndStitch`.
        device: Where to put the model; default: the CPU.

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
    own = _one_of(upsampler, weights)
    looks_per_side = math.isqrt(max(looks, 0))
    if looks < 1 or looks_per_side**2 != looks:
        raise ValueError(f"looks must be a square number, such as 1 or 4; got {looks}")
    with _undisturbed(pretrained):
        # The small file first: what fails should fail before a large download.
        stack, norm = _read_upsampler(row.upsampler_file, pretrained, own)
        origin = own or row.upsampler_file.filename
        if norm is not None and not use_norm:
            raise ValueError(
                f"{origin} was trained behind a channel norm, which it holds; got use_norm=False; "
                "leave it at True (leave --no-norm out)"
            )
        if norm is None and use_norm and stack.feat_dim is not None:
            raise ValueError(
                f"{origin} was trained for one backbone without a channel norm; got "
                "use_norm=True; pass use_norm=False (give --no-norm)"
            )
        backbone = load_backbone(
            name,
            pretrained=pretrained,
            weights=backbone_weights,
            backbone_kwargs=backbone_kwargs,
            layer=layer,
        )
        if looks > 1:
            backbone = ShiftAndStitch(backbone, looks_per_side)
        stride = backbone.patch_size
        model = UpsampledBackbone(
            backbone,
            stack,
            norm=ChannelNorm(backbone.feat_dim) if use_norm else None,
            image_size=max(round(row.image_size / stride), 1) * stride,
        )
        if norm is not None and model.norm is not None:
            load_into(model.norm, norm, origin=origin)
    return model.to(device or "cpu").eval()


def load_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    layer: int | None = None,
) -> Backbone:
    """Loads a model's backbone alone, see :func:`load`.

    Args:
        name: One of :func:`list_models`, any name of timm's, ``hf-hub:owner/name``, or the name
            that Meta gives one of its models.
        pretrained: Whether to load the weights that the model's card names.
        weights: A file of your own, read in any case: laid out as timm's or as its authors', with
            any number of classes, or none.
        backbone_kwargs: Arguments for ``timm.create_model``, such as ``{"img_size": 448}``.
        layer: Which features, see :class:`~featup_hub.TimmBackbone`; default: the card's.

    Returns:
        The backbone, on the CPU, in evaluation mode.
    """
    row, architecture = _card_with_backbone(name)
    if layer is not None and row.kind != "timm":
        raise ValueError(f"{name} has features of one layer only; got {layer=}; leave it out")
    with _undisturbed(pretrained):
        shipped = row.backbone_file
        own: Mapping[str, Tensor] | str | Path | None = weights
        if own is None and pretrained and shipped is not None:
            own = load_weights(shipped)
        backbone: Backbone
        if row.kind == "timm":
            backbone = TimmBackbone(
                architecture,
                pretrained=pretrained,
                weights=own,
                layer=layer,
                stride=row.patch_size if layer is None else None,
                backbone_kwargs=backbone_kwargs,
            )
        else:
            kind = ClipBackbone if row.kind == "clip" else MaskClipBackbone
            backbone = kind(
                architecture, pretrained=pretrained, weights=own, backbone_kwargs=backbone_kwargs
            )
    return backbone.eval()


def load_upsampler(
    upsampler: str | Path | None = None,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
) -> JBUStack:
    """Loads the upsampler alone, for features of your own.

    Args:
        upsampler: A shipped upsampler or a file of your own, see :func:`load`.
        pretrained: Whether to load the weights that come with the package, which fit any number
            of channels.
        weights: Former name of ``upsampler``.
        device: Where to put it; default: the CPU.

    Returns:
        The upsampler ``(source, guidance) -> features``, in evaluation mode. Its
        guidance is an image normalised as ImageNet's.

    Raises:
        ValueError: If the file is damaged, does not fit, or holds a channel norm, too.
        FileNotFoundError: If a file of your own does not exist.

    Example:
        >>> upsampler = load_upsampler(pretrained=False)
        >>> upsampler(torch.randn(1, 5, 4, 6), torch.randn(1, 3, 56, 84)).shape
        torch.Size([1, 5, 56, 84])
    """
    own = _one_of(upsampler, weights)
    with _undisturbed(pretrained):
        stack, norm = _read_upsampler(JBU_UNIVERSAL, pretrained, own)
    if norm is not None:
        raise ValueError(
            f"{own} holds a channel norm, which belongs behind its backbone; "
            "load both: load(NAME, upsampler=...)"
        )
    return stack.to(device or "cpu").eval()


def _one_of(upsampler: str | Path | None, weights: str | Path | None) -> str | Path | None:
    """Returns what was given under the present name or the former one."""
    if upsampler is not None and weights is not None:
        raise ValueError(
            f"weights is the former name of upsampler; got both, {upsampler} and {weights}; "
            "leave weights out"
        )
    return weights if upsampler is None else upsampler


def _card_with_backbone(name: str) -> tuple[ModelCard, str]:
    """Returns a card, and what its backbone is called in timm."""
    row = find_card(name)
    if row.backbone is None:
        raise ValueError(
            f"a model with a backbone is needed; got {name!r}, an upsampler alone; "
            "call load_upsampler(), or name another model"
        )
    return row, row.backbone


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
    """Builds on the CPU, without changing the random state if weights will be overwritten."""
    with torch.random.fork_rng(devices=[], enabled=pretrained), torch.device("cpu"):
        yield
