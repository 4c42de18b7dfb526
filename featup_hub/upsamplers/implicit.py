r"""The implicit upsampler: a small coordinate network that holds one image's features.

.. math:: F(y, x) = \mu + D\,\mathrm{MLP}(\mathrm{norm}([\sin(\omega s + \varphi),
    \cos(\omega s + \psi), r, g, b])), \quad s \in \{y, x, r, g, b\}

s are the position and the colour there, each scaled to [0, 1]; the phases φ, ψ are learned. The
network answers in the coordinates of a principal component analysis, (μ, D). It is fitted by
:func:`featup_hub.training.implicit.fit`; this module is what remains: it holds the image, and
tells its features at any size or point.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.upsamplers.coordinates import FourierFeatures, pixel_centres, sample
from featup_hub.weights import load_into, metadata, read, write

__all__ = ["ImplicitUpsampler"]

FORMAT = "featup_hub.implicit/2"  # 2 notes dropout, and whether there is a base


class ImplicitUpsampler(nn.Module):
    """One image's features at any resolution, see :mod:`featup_hub.upsamplers.implicit`.

    Args:
        image: The image, normalised RGB, (1, 3, H, W).
        mean: Mean of the features, (C,).
        directions: Features per coordinate of the network, (C, K).
        frequencies: Number of frequencies.
        log_range: Natural logarithms of the lowest and the highest.
        hidden: Width of the network.
        dropout: Chance that an input of the network is dropped, for all points alike.
        base: Coordinates to which the network adds, (1, K, h, w), interpolated bilinearly.
        backbone: Name of the backbone.
        backbone_digest: Digest of its weights.
        scores: How well the fit went, by metric.

    Raises:
        ValueError: If ``image`` is not (1, 3, H, W), ``dropout`` not in [0, 1), or a score not a
            finite number.

    Example:
        >>> upsampler = ImplicitUpsampler(torch.rand(1, 3, 6, 9), torch.zeros(8), torch.eye(8))
        >>> upsampler.features((12, 18)).shape, upsampler.features_at([[2.5, 7.0]]).shape
        (torch.Size([1, 8, 12, 18]), torch.Size([1, 8]))
    """

    image: Tensor
    mean: Tensor
    directions: Tensor
    base: Tensor | None

    def __init__(
        self,
        image: Tensor,
        mean: Tensor,
        directions: Tensor,
        *,
        frequencies: int = 30,
        log_range: tuple[float, float] = (-2.0, 10.0),
        hidden: int = 128,
        dropout: float = 0.2,
        base: Tensor | None = None,
        backbone: str = "",
        backbone_digest: str = "",
        scores: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if image.dim() != 4 or image.shape[:2] != (1, 3):
            raise ValueError(
                f"an implicit upsampler holds one RGB image, (1, 3, H, W); "
                f"got {tuple(image.shape)}; fit one per image"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {dropout}; 0 drops nothing")
        self.register_buffer("image", image.detach().clone())
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("directions", directions.detach().clone())
        self.register_buffer("base", None if base is None else base.detach().half())
        self.fourier = FourierFeatures(frequencies, log_range)
        inputs = 10 * frequencies + 3
        self.norm = nn.LayerNorm(inputs)
        widths = (inputs, hidden, hidden, directions.shape[1])
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.dropout = float(dropout)
        self.backbone, self.backbone_digest = backbone, backbone_digest
        self.scores = _finite({} if scores is None else scores)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    @property
    def feat_dim(self) -> int:
        """Channels of the features."""
        return len(self.mean)

    def forward(self, size: tuple[int, int] | None = None) -> Tensor:
        """Returns :meth:`features`."""
        return self.features(size)

    @torch.no_grad()
    def features(self, size: tuple[int, int] | None = None, *, tile: int = 1 << 15) -> Tensor:
        """Tells the features of the whole image.

        Args:
            size: Height and width wanted; default: the image's own. For a smaller one the image
                is reduced with antialiasing, and the features are those of what is left.
            tile: Positions to compute at a time, which bounds the memory beside the result.

        Returns:
            Features, (1, C, *size).

        Raises:
            ValueError: If ``size`` or ``tile`` is not positive.
        """
        height, width = self._wanted(size, tile)
        features = self.mean.new_empty(1, self.feat_dim, height, width)
        for top, strip in self.strips(size, tile=tile):
            features[:, :, top : top + strip.shape[2]] = strip
        return features

    @torch.no_grad()
    def strips(
        self, size: tuple[int, int] | None = None, *, tile: int = 1 << 15
    ) -> Iterator[tuple[int, Tensor]]:
        """Tells the features strip by strip, for sizes that do not fit in memory.

        Args:
            size: Height and width wanted; default: the image's own.
            tile: Positions per strip, rounded down to whole rows, but one row at least.

        Yields:
            First row of a strip, and its features, (1, C, rows, width).

        Raises:
            ValueError: If ``size`` or ``tile`` is not positive; when the first strip is asked for.
        """
        height, width = self._wanted(size, tile)
        image = self._resized((height, width))
        rows = max(tile // width, 1)
        for top in range(0, height, rows):
            part = image[:, :, top : top + rows]
            count = part.shape[2]
            position = pixel_centres(height, width, image.device)[top : top + rows]
            flat = self.coordinates(position.flatten(0, 1), part.flatten(2)[0].t())
            yield top, self.restore(flat).t().unflatten(1, (count, width))[None]

    @torch.no_grad()
    def features_at(self, points: Tensor | list[list[float]], *, tile: int = 1 << 15) -> Tensor:
        """Tells the features at points of the image.

        Args:
            points: Rows and columns, (N, 2), in pixels of the image; whole numbers are the
                centres of pixels, so that the image reaches from -0.5 to H - 0.5.
            tile: Points to compute at a time.

        Returns:
            Features, (N, C).

        Raises:
            ValueError: If ``points`` is not (N, 2), or one lies outside of the image, or ``tile``
                is not positive.
        """
        self._wanted(None, tile)
        points = torch.as_tensor(points, dtype=self.mean.dtype, device=self.mean.device)
        if points.dim() != 2 or points.shape[1] != 2:
            raise ValueError(f"points must be (N, 2), row and column; got {tuple(points.shape)}")
        size = points.new_tensor(self.image_size)
        inside = ((points >= -0.5) & (points <= size - 0.5)).all(1)  # which no NaN is
        if not inside.all():
            raise ValueError(
                f"points must lie in the image, -0.5 to {size[0] - 0.5:g} by -0.5 to "
                f"{size[1] - 0.5:g} pixels; got {points[~inside][0].tolist()}; leave it out"
            )
        position = (points + 0.5) / size
        parts = [self.restore(self.coordinates(p)) for p in position.split(tile)]
        return torch.cat(parts) if parts else self.mean.new_empty(0, self.feat_dim)

    def coordinates(self, position: Tensor, colour: Tensor | None = None) -> Tensor:
        """Runs the network; this is what is differentiable.

        Args:
            position: Fractions of height and width, (N, 2), in [0, 1].
            colour: Normalised RGB there, (N, 3); default: the image's, interpolated bilinearly.

        Returns:
            Coordinates, (N, K).
        """
        colour = sample(self.image, position) if colour is None else colour
        low, high = self.image.amin((0, 2, 3)), self.image.amax((0, 2, 3))
        colour = (colour - low) / (high - low).clamp(min=1e-6)
        x = torch.cat([self.fourier(torch.cat([position, colour], dim=1)), colour], dim=1)
        # One mask for all points leaves a network of fewer inputs, not a noisy picture; on the
        # weights it is almost free. It is drawn on the CPU, so that it is the same everywhere.
        keep = F.dropout(torch.ones(len(self.norm.weight)), self.dropout, self.training).to(x)
        first, second, last = (cast(nn.Linear, layer) for layer in self.layers)
        x = F.linear(self.norm(x), first.weight * keep, first.bias).relu()
        x = last(second(x).relu())
        return x if self.base is None else x + sample(self.base, position)

    def restore(self, coordinates: Tensor) -> Tensor:
        """Returns features, (N, C), of coordinates, (N, K)."""
        return torch.addmm(self.mean, coordinates.to(self.mean), self.directions.t())

    def save(self, path: str | Path) -> None:
        """Writes all that is needed to tell the same features again, as safetensors.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If a score is not a finite number.
        """
        notes = {
            "upsampler": FORMAT,
            "backbone": self.backbone,
            "backbone_digest": self.backbone_digest,
            "base": "no" if self.base is None else "yes",
            "dropout": repr(self.dropout),
            "scores": json.dumps(_finite(self.scores), sort_keys=True),
        }
        write(self.state_dict(), path, metadata=notes)

    @classmethod
    def load(cls, path: str | Path) -> ImplicitUpsampler:
        """Reads what :meth:`save` wrote; nothing random is drawn.

        Returns:
            The upsampler, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, of another version, or no implicit upsampler.
        """
        tensors, notes = read(path), metadata(path)
        if notes.get("upsampler") != FORMAT:
            got = notes.get("upsampler", "a file of other weights")
            raise ValueError(
                f"{path} must be an implicit upsampler of format {FORMAT}; got {got}; "
                "make one with: featup-hub fit IMAGE"
            )
        try:
            # Without the note, a file that lost its base would tell other features.
            if notes["base"] != ("yes" if "base" in tensors else "no"):
                raise ValueError(f"base, noted as {notes['base']:.20}")
            held = (tensors[name] for name in ("image", "mean", "directions"))
            with torch.device("meta"):
                module = cls(
                    *(tensor.to("meta", torch.float32) for tensor in held),
                    frequencies=len(tensors["fourier.frequency"]),
                    hidden=len(tensors["layers.0.bias"]),
                    dropout=float(notes["dropout"]),
                    base=tensors["base"].to("meta") if "base" in tensors else None,
                    backbone=notes["backbone"],
                    backbone_digest=notes["backbone_digest"],
                    scores=_finite(json.loads(notes["scores"])),  # of a file, "null" is wrong
                )
            # Parts may each be sound and not fit one another; notes may nest without end.
            module._check_parts()
        except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{path} must hold all of an implicit upsampler; it lacks or spoils {error}; "
                "save it anew"
            ) from None
        load_into(module, tensors, origin=path)
        for name, tensor in module.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{path} must hold finite numbers; got others in {name}; fit the image anew"
                )
        return module.eval()

    def _check_parts(self) -> None:
        """Raises ValueError unless the tensors held belong to one image's features."""
        channels, coordinates = self.feat_dim, self.layers[-1].out_features
        wanted = {"mean": (channels,), "directions": (channels, coordinates)}
        for name, tensor in self.named_buffers():
            shape = tuple(tensor.shape)
            if shape != wanted.get(name, shape) or 0 in shape:
                raise ValueError(f"{name}: {shape}")
        if self.base is not None and (
            self.base.dim() != 4 or self.base.shape[:2] != (1, coordinates)
        ):
            raise ValueError(f"base: {tuple(self.base.shape)}, needed (1, {coordinates}, h, w)")

    def _wanted(self, size: tuple[int, int] | None, tile: int) -> tuple[int, int]:
        """Returns the size wanted, or raises ValueError unless it and ``tile`` are positive."""
        height, width = self.image_size if size is None else size
        if height < 1 or width < 1 or tile < 1:
            raise ValueError(
                f"size and tile must be positive; got {(height, width)} and {tile}; "
                "leave them out for the image's own size"
            )
        return height, width

    def _resized(self, size: tuple[int, int]) -> Tensor:
        if size == self.image_size:
            return self.image
        # Apple's devices have no antialiasing in older releases of torch; one image is soon done.
        image = self.image.cpu() if self.image.device.type == "mps" else self.image
        return F.interpolate(image, size, mode="bilinear", antialias=True).to(self.image.device)


def _finite(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns scores as a dict of floats, or raises ValueError unless all are finite numbers."""
    most = sys.float_info.max
    if not isinstance(scores, Mapping) or not all(
        isinstance(score, int | float) and abs(score) <= most for score in scores.values()
    ):
        raise ValueError(f"scores must be finite numbers by name; got {scores!r:.100}")
    return {name: float(score) for name, score in scores.items()}
