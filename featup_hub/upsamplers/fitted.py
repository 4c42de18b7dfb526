"""Fitted features of one image: computed at any size or point, saved, loaded.

:func:`featup_hub.fit` makes these objects. There are two kinds: :class:`JBUFit`, which is exact,
and :class:`featup_hub.upsamplers.implicit.ImplicitUpsampler`, FeatUp's coordinate network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops.jbu import check_floating
from featup_hub.upsamplers.coordinates import sample
from featup_hub.upsamplers.jbu import JBUStack
from featup_hub.upsamplers.plan import output_size
from featup_hub.weights import load_into, metadata, read, write

if TYPE_CHECKING:
    from typing_extensions import Self


class FittedFeatures(nn.Module):
    """One image's features at any resolution. :meth:`load` reads files of both kinds.

    Args:
        image: The image, normalised RGB, (1, 3, H, W).

    Attributes:
        backbone: Name of the backbone.
        backbone_digest: Digest of its weights.
        scores: Scores of the fit by name.

    Raises:
        ValueError: If ``image`` is not (1, 3, H, W).
    """

    FORMAT: ClassVar[str] = ""
    image: Tensor

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        check_floating(image, "image")
        if image.dim() != 4 or image.shape[:2] != (1, 3):
            raise ValueError(
                f"fitted features belong to one RGB image, (1, 3, H, W); "
                f"got {tuple(image.shape)}; fit one per image"
            )
        self.register_buffer("image", image.detach().clone())
        self.backbone = self.backbone_digest = ""
        self.scores: dict[str, float] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    @property
    def feat_dim(self) -> int:
        """Channels of the features."""
        raise NotImplementedError

    def forward(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """Returns :meth:`features`."""
        return self.features(size)

    def features(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """Returns the features of the whole image, ``(1, C, *size)``.

        Args:
            size: Height and width of the result, or its short side; default: the image's.

        Raises:
            ValueError: If ``size`` is not positive.
        """
        raise NotImplementedError

    def features_at(self, points: Tensor | list[list[float]]) -> Tensor:
        """Returns the features at points of the image.

        Args:
            points: Rows and columns, (N, 2), in pixels of the image. Whole numbers are the
                centres of pixels, so the image reaches from -0.5 to H - 0.5.

        Returns:
            Features, (N, C).

        Raises:
            ValueError: If ``points`` is not (N, 2), or a point is outside the image.
        """
        # Half precision would move the points of a converted fit by pixels.
        dtype = torch.promote_types(self.image.dtype, torch.float32)
        points = torch.as_tensor(points, dtype=dtype, device=self.image.device)
        if points.dim() != 2 or points.shape[1] != 2:
            raise ValueError(f"points must be (N, 2), row and column; got {tuple(points.shape)}")
        size = points.new_tensor(self.image_size)
        inside = ((points >= -0.5) & (points <= size - 0.5)).all(1)  # false for NaN
        if not inside.all():
            raise ValueError(
                f"points must lie in the image, -0.5 to {size[0] - 0.5:g} by -0.5 to "
                f"{size[1] - 0.5:g} pixels; got {points[~inside][0].tolist()}; leave it out"
            )
        return self._at((points + 0.5) / size).to(self.image.dtype)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file from which :meth:`load` restores the same features.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If a score is not a finite number.
        """
        scores = {name: float(score) for name, score in self.scores.items()}
        notes = {
            "upsampler": self.FORMAT,
            "backbone": self.backbone,
            "backbone_digest": self.backbone_digest,
            "scores": json.dumps(scores, sort_keys=True, allow_nan=False),
        }
        write(self.state_dict(), path, metadata={**notes, **self._notes()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a file of :meth:`save`, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, has another version, or is not a fit.
        """
        from featup_hub.upsamplers import implicit  # noqa: F401  (its class is one of the kinds)

        tensors, notes = read(path), metadata(path)
        kinds = {kind.FORMAT: kind for kind in (cls, *cls.__subclasses__()) if kind.FORMAT}
        found = notes.get("upsampler", "a file of other weights")
        if "features" in tensors:
            found = "features of featup-hub upsample"
        if found not in kinds:
            raise ValueError(
                f"{path} must be a fit of format {' or '.join(kinds)}; got {found}; "
                "make one with: featup-hub fit IMAGE"
            )
        try:
            with torch.device("meta"):
                module = kinds[found]._for(tensors, notes)
            module.backbone, module.backbone_digest = notes["backbone"], notes["backbone_digest"]
            module.scores = {k: float(v) for k, v in json.loads(notes["scores"]).items()}
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{path} must be a complete fit; missing or wrong: {error}; save it again"
            ) from None
        load_into(module, tensors, origin=path)
        return module.eval().requires_grad_(False)

    def _wanted(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Returns the size of a result; raises ValueError unless it is positive."""
        wanted = output_size(self.image, size)
        if min(wanted) < 1:
            raise ValueError(
                f"size must be positive; got {size}; leave it out for the image's own size"
            )
        return wanted

    def _at(self, position: Tensor) -> Tensor:
        """Returns features, (N, C), at fractions of height and width, (N, 2)."""
        raise NotImplementedError

    def _notes(self) -> dict[str, str]:
        """Returns the file's metadata."""
        return {}

    @classmethod
    def _for(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Self:
        """Makes a module with the shapes of a file's tensors and metadata, without values."""
        raise NotImplementedError


class JBUFit(FittedFeatures):
    """One image's features, F = U z: a source upsampled by JBU stages with the image as guidance.

    Args:
        image: The image, normalised RGB, (1, 3, H, W).
        source: z, (1, C, h, w).
        upsampler: The stages.

    Example:
        >>> fitted = JBUFit(torch.randn(1, 3, 6, 9), torch.rand(1, 8, 2, 3), JBUStack())
        >>> fitted.features((12, 18)).shape, fitted.features_at([[2.5, 7.0]]).shape
        (torch.Size([1, 8, 12, 18]), torch.Size([1, 8]))
    """

    FORMAT = "featup_hub.jbu_fit/1"
    source: Tensor

    def __init__(self, image: Tensor, source: Tensor, upsampler: JBUStack) -> None:
        super().__init__(image)
        check_floating(source, "source")
        if source.dim() != 4 or source.shape[0] != 1 or 0 in source.shape:
            raise ValueError(f"source must be (1, C, h, w); got {tuple(source.shape)}")
        self.register_buffer("source", source.detach().clone())
        self.upsampler = upsampler

    @property
    def feat_dim(self) -> int:
        """Channels of the features."""
        return self.source.shape[1]

    def features(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """Returns the features of the whole image, ``(1, C, *size)``, differentiable in ``source``.

        Another size than the image's is made by resizing bilinearly, with antialiasing.
        """
        size = self._wanted(size)
        features: Tensor = self.upsampler(self.source, self.image)
        if size == self.image_size:
            return features
        return F.interpolate(features, size, mode="bilinear", antialias=True)

    def _at(self, position: Tensor) -> Tensor:
        return sample(self.features(), position)

    def _notes(self) -> dict[str, str]:
        count = self.upsampler.looks_per_side
        return {} if count == 1 else {"looks_per_side": str(count)}

    @classmethod
    def _for(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Self:
        prefix = "upsampler."
        stages = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        image, source = (tensors[name].to("meta", torch.float32) for name in ("image", "source"))
        looks_per_side = int(notes.get("looks_per_side", "1"))
        return cls(image, source, JBUStack.fitting(stages, looks_per_side=looks_per_side))
