r"""The implicit upsampler: a small coordinate network that represents one image's features.

.. math:: F(y, x) = \mu + D\,\mathrm{MLP}(\mathrm{norm}([\sin(\omega s + \varphi),
    \cos(\omega s + \psi), r, g, b])), \quad s \in \{y, x, r, g, b\}

s are position and colour, each scaled to [0, 1]; the phases φ, ψ are learned. The
network predicts principal components, (μ, D). :func:`featup_hub.training.network.fit_network`
trains it. The module stores the image and computes its features at any size or point.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops.jbu import check_numbers
from featup_hub.upsamplers.coordinates import FourierFeatures, pixel_centres, sample
from featup_hub.upsamplers.fitted import FittedFeatures

if TYPE_CHECKING:
    from typing_extensions import Self

_TILE = 1 << 15  # points in one pass of the network


class ImplicitUpsampler(FittedFeatures):
    """One image's features at any resolution, see :mod:`featup_hub.upsamplers.implicit`.

    Args:
        image: The image, normalised RGB, (1, 3, H, W).
        mean: Mean of the features, (C,).
        directions: Features per coordinate of the network, (C, K).
        frequencies: Number of frequencies.
        log_range: Natural logarithms of the lowest and highest frequency.
        hidden: Width of the network.
        dropout: Probability of dropping an input of the network, at all points at once.

    Raises:
        ValueError: If ``image`` is not (1, 3, H, W), or ``dropout`` not in [0, 1).

    Example:
        >>> upsampler = ImplicitUpsampler(torch.rand(1, 3, 6, 9), torch.zeros(8), torch.eye(8))
        >>> upsampler.features((12, 18)).shape, upsampler.features_at([[2.5, 7.0]]).shape
        (torch.Size([1, 8, 12, 18]), torch.Size([1, 8]))
    """

    FORMAT = "featup_hub.implicit/2"  # 2 stores dropout
    mean: Tensor
    directions: Tensor

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
    ) -> None:
        super().__init__(image)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {dropout}; 0 drops nothing")
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("directions", directions.detach().clone())
        self.fourier = FourierFeatures(frequencies, log_range)
        inputs = 10 * frequencies + 3
        self.norm = nn.LayerNorm(inputs)
        widths = (inputs, hidden, hidden, directions.shape[1])
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.dropout = float(dropout)

    @property
    def feat_dim(self) -> int:
        """Channels of the features."""
        return len(self.mean)

    @torch.no_grad()
    def features(self, size: int | tuple[int, int] | None = None, *, tile: int = _TILE) -> Tensor:
        """Returns the features of the whole image, ``(1, C, *size)``.

        Args:
            size: Height and width of the result, or its short side; default: the image's. For a
                smaller size the image is reduced with antialiasing first.
            tile: Positions per pass of the network; bounds the working memory.

        Raises:
            ValueError: If ``size`` or ``tile`` is not positive.
        """
        height, width = self._wanted(size)
        features = self.mean.new_empty(1, self.feat_dim, height, width)
        for top, strip in self.strips(size, tile=tile):
            features[:, :, top : top + strip.shape[2]] = strip
        return features

    @torch.no_grad()
    def strips(
        self, size: int | tuple[int, int] | None = None, *, tile: int = _TILE
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields the features strip by strip, for sizes that do not fit in memory.

        Arguments and errors are those of :meth:`features`. A strip has as many whole rows as
        ``tile`` positions hold, at least one.

        Yields:
            First row of a strip, and its features, (1, C, rows, width).
        """
        check_numbers(1, tile=tile)
        height, width = self._wanted(size)
        image = self._resized((height, width))
        rows = max(tile // width, 1)
        for top in range(0, height, rows):
            part = image[:, :, top : top + rows]
            count = part.shape[2]
            position = pixel_centres(height, width, image.device)[top : top + rows]
            flat = self.coordinates(position.flatten(0, 1), part.flatten(2)[0].t())
            yield top, self.restore(flat).t().unflatten(1, (count, width))[None]

    @torch.no_grad()
    def _at(self, position: Tensor) -> Tensor:
        parts = [self.restore(self.coordinates(part)) for part in position.split(_TILE)]
        return torch.cat(parts) if parts else self.mean.new_empty(0, self.feat_dim)

    def coordinates(self, position: Tensor, colour: Tensor | None = None) -> Tensor:
        """Runs the network, differentiably; returns coordinates, (N, K).

        ``position`` holds fractions of height and width, (N, 2); ``colour`` normalised RGB, (N, 3),
        by default the image's, interpolated bilinearly.
        """
        colour = sample(self.image, position) if colour is None else colour
        low, high = self.image.amin((0, 2, 3)), self.image.amax((0, 2, 3))
        colour = (colour - low) / (high - low).clamp(min=1e-6)
        x = torch.cat([self.fourier(torch.cat([position, colour], dim=1)), colour], dim=1)
        # One mask for all points removes inputs; a mask per point would add noise. Masking the
        # weights is almost free. It is drawn on the CPU, so it is the same on every device.
        keep = F.dropout(torch.ones(len(self.norm.weight)), self.dropout, self.training).to(x)
        first, second, last = (cast(nn.Linear, layer) for layer in self.layers)
        x = F.linear(self.norm(x), first.weight * keep, first.bias).relu()
        coordinates: Tensor = last(second(x).relu())
        return coordinates

    def restore(self, coordinates: Tensor) -> Tensor:
        """Converts coordinates, (N, K), to features, (N, C)."""
        return torch.addmm(self.mean, coordinates.to(self.mean), self.directions.t())

    def _notes(self) -> dict[str, str]:
        return {"dropout": repr(self.dropout)}

    @classmethod
    def _for(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Self:
        held = (tensors[name] for name in ("image", "mean", "directions"))
        return cls(
            *(tensor.to("meta", torch.float32) for tensor in held),
            frequencies=len(tensors["fourier.frequency"]),
            hidden=len(tensors["layers.0.bias"]),
            dropout=float(notes["dropout"]),
        )

    def _resized(self, size: tuple[int, int]) -> Tensor:
        if size == self.image_size:
            return self.image
        # Apple's devices have no antialiasing in older releases of torch.
        image = self.image.cpu() if self.image.device.type == "mps" else self.image
        return F.interpolate(image, size, mode="bilinear", antialias=True).to(self.image.device)
