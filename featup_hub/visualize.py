"""Pictures of feature maps: the first three principal components as red, green and blue.

Compare maps only in one shared basis; else their colours mean different things.
Plain torch; the same maps give the same picture on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["PCABasis", "comparison", "contact_sheet", "fit_pca", "pca_rgb", "picture"]

_SAMPLES = 2048  # most positions per map to fit a basis
_MARGIN, _FONT, _SMALLEST, _LARGEST = 12, 16, 224, 1024  # of a sheet, pixels


@dataclass(frozen=True, kw_only=True)
class PCABasis:
    """A map from features to colours.

    Attributes:
        mean: Mean of the features, (C,).
        components: Principal components, orthonormal columns by falling variance, (C, k). The
            largest entry of each is positive. Components without variance are zero.
        low: Value along each component that is shown as 0, (k,).
        high: Value that is shown as 1, (k,).
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor


def fit_pca(*features: Tensor, k: int = 3) -> PCABasis:
    """Finds the principal components of feature maps.

    Uses at most 2,048 evenly spread positions of each map, so a large map is never copied. Colours
    span the 1st to the 99th percentile, so that a few outliers do not darken the rest.

    Args:
        features: One map or several with the same channels, each (B, C, H, W).
        k: Number of directions.

    Returns:
        The basis, float32 on the CPU.

    Example:
        >>> source = torch.randn(1, 32, 14, 14)
        >>> pca_rgb(source, fit_pca(source)).shape
        torch.Size([1, 3, 14, 14])
    """
    shapes = [_shape(f) for f in features]
    if not shapes or any(len(s) != 4 or 0 in s for s in shapes) or len({s[1] for s in shapes}) != 1:
        raise ValueError(f"fit_pca needs maps (B, C, H, W) with the same channels; got {shapes}")
    rows = torch.cat([_sample(f) for f in features])
    if not rows.isfinite().all():
        raise ValueError("features must be finite; got NaN or infinity, what made them is broken")
    mean = rows.mean(0)
    rows = rows - mean
    _, variation, directions = torch.linalg.svd(rows, full_matrices=False)
    noise = max(rows.shape) * torch.finfo(rows.dtype).eps * mean.abs().max().clamp(min=1)
    directions = directions[variation > noise][:k]
    # The sign of a component is arbitrary: fix it, so that pictures can be compared.
    peak = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    components = F.pad(directions * peak.sign(), (0, 0, 0, k - len(directions))).T
    low, high = (rows @ components).quantile(torch.tensor([0.01, 0.99], dtype=rows.dtype), dim=0)
    return PCABasis(
        mean=mean.float(), components=components.float(), low=low.float(), high=high.float()
    )


def pca_rgb(features: Tensor, basis: PCABasis) -> Tensor:
    """Converts features, (B, C, H, W), to colours in a basis, without copying the features.

    Returns:
        Colours in [0, 1], (B, k, H, W), float32; 0.5 for components without variation.
    """
    channels = len(basis.mean)
    if len(_shape(features)) != 4 or features.shape[1] != channels:
        raise ValueError(
            f"this basis is for features (B, {channels}, H, W); got {_shape(features)}; "
            "fit one on these"
        )
    return _colours(_project(features, basis), basis)


def comparison(image: Image.Image, source: Tensor, upsampled: Tensor) -> Image.Image:
    """Draws an image, its features, and the features upsampled bilinearly and by a model.

    All three maps are shown in one basis, fitted on the source.

    Args:
        image: The backbone's input before normalisation.
        source: Low-resolution features, (1, C, h, w).
        upsampled: Features at the image's size, (1, C, H, W).

    Returns:
        Four captioned panels, two by two for a wide image, else in a row.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image must be a PIL image; got {type(image).__name__}; "
            "call featup_hub.read_image(path)"
        )
    if _shape(source)[:2] != _shape(upsampled)[:2]:
        raise ValueError(
            "source and upsampled must have the same channels, as model.source(image) and "
            f"model(image) have; got {_shape(source)} and {_shape(upsampled)}"
        )
    basis = fit_pca(source)
    height, width = upsampled.shape[-2:]
    projected = _project(source, basis)
    # Bilinear weights sum to one, so resizing commutes with the projection.
    bilinear = F.interpolate(projected, (height, width), mode="bilinear")
    maps = [
        (f"backbone features, {source.shape[-2]}x{source.shape[-1]}", _colours(projected, basis)),
        ("bilinear", _colours(bilinear, basis)),
        (f"upsampled features, {height}x{width}", pca_rgb(upsampled, basis)),
    ]
    panels = [("image", image), *((caption, picture(colours)) for caption, colours in maps)]
    return contact_sheet(panels, size=image.size, columns=2 if width > height else 4)


def contact_sheet(
    panels: Sequence[tuple[str, Image.Image]], *, size: tuple[int, int], columns: int
) -> Image.Image:
    """Draws pictures side by side, each under its caption.

    Args:
        panels: Captions and pictures. Each picture is resized to a common size; enlarged pixels
            stay sharp squares.
        size: Width and height of a panel. Small ones are enlarged by a whole factor to at least
            224 pixels, large ones reduced to 1,024.
        columns: Panels in a row.
    """
    scale = min(-(-_SMALLEST // max(size)), _LARGEST / max(size))
    width, height = (max(round(side * scale), 1) for side in size)
    font = ImageFont.load_default(_FONT)
    caption = 2 * _FONT
    cell = max(width, *(round(font.getlength(text)) for text, _ in panels)) + _MARGIN
    rows = -(-len(panels) // columns)
    sheet_size = (cell * columns + _MARGIN, (caption + height) * rows + _MARGIN)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (text, picture) in enumerate(panels):
        x = _MARGIN + cell * (index % columns)
        y = (caption + height) * (index // columns)
        draw.text((x, y + caption // 2), text, fill="black", font=font, anchor="lm")
        grows = picture.size[0] < width
        how = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
        sheet.paste(picture.resize((width, height), how), (x, y + caption))
    return sheet


def _shape(features: Tensor) -> tuple[int | str, ...]:
    """Returns a tensor's shape, or what an array or list in place of one is."""
    return tuple(features.shape) if isinstance(features, Tensor) else (type(features).__name__,)


def _sample(features: Tensor) -> Tensor:
    """Takes evenly spread positions of a map: (B, C, H, W) -> (N, C), float64 on the CPU."""
    batch, _, height, width = features.shape
    total = batch * height * width
    index = torch.linspace(0, total - 1, min(total, _SAMPLES), dtype=torch.float64).round().long()
    index = index.to(features.device)
    b, y, x = index // (height * width), index // width % height, index % width
    return features.detach()[b, :, y, x].cpu().double()


def _project(features: Tensor, basis: PCABasis) -> Tensor:
    """Returns coordinates along the components, (B, k, H, W), float32 on the CPU."""
    components = basis.components.to(features)
    # One sample at a time, so that the matrix product needs no copy in either memory format.
    maps = [torch.einsum("chw,ck->khw", sample, components) for sample in features.detach()]
    return torch.stack(maps).cpu().float() - (basis.mean @ basis.components)[:, None, None]


def _colours(projected: Tensor, basis: PCABasis) -> Tensor:
    low, span = basis.low[:, None, None], (basis.high - basis.low)[:, None, None]
    shade = (projected - low) / span.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(span > 0, shade, torch.full_like(shade, 0.5)).clamp(0, 1)


def picture(colours: Tensor) -> Image.Image:
    """Converts colours in [0, 1], (1, 3, H, W), to a PIL image."""
    return Image.fromarray((colours[0].permute(1, 2, 0) * 255).round().byte().numpy())
