r"""The joint bilateral upsampler in plain PyTorch: the definition that all implementations match.

One stage takes a low-resolution ``source`` and a ``guidance`` image of the stage's output size.
:func:`jbu_kernel` predicts one D×D kernel per output pixel from the guidance only;
:func:`jbu_apply` resizes the source bicubically and filters it with those kernels. Both are simple,
differentiable by autograd, and exportable; neither is fast.

Source: Fu, Hamilton et al., "FeatUp: A Model-Agnostic Framework for Features at Any Resolution",
ICLR 2024 (arXiv 2403.10516), eqs. 4-6; numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
MIN_SUM = 1e-7
FIXUP_SCALE = 0.1
MIN_WIDTH = 1e-3  # smallest width; avoids division by zero


class StageWeights(NamedTuple):
    """The ten tensors of one stage, 1×1 convolutions as plain matrices.

    G is the number of guidance channels, K the key channels, T = D² the taps.

    Attributes:
        range_temp: Logarithm of the inverse temperature, ().
        sigma_spatial: Width of the spatial Gaussian; the kernel spans [-1, 1], ().
        range_w0: First layer of the range projection, (K, G).
        range_b0: Its bias, (K,).
        range_w1: Second layer of the range projection, (K, K).
        range_b1: Its bias, (K,).
        fixup_w0: First layer of the correction, (T, T + G): kernel first, guidance after.
        fixup_b0: Its bias, (T,).
        fixup_w1: Second layer of the correction, (T, T).
        fixup_b1: Its bias, (T,).
    """

    range_temp: Tensor
    sigma_spatial: Tensor
    range_w0: Tensor
    range_b0: Tensor
    range_w1: Tensor
    range_b1: Tensor
    fixup_w0: Tensor
    fixup_b0: Tensor
    fixup_w1: Tensor
    fixup_b1: Tensor

    @property
    def diameter(self) -> int:
        """Side D of the kernel, 2·radius + 1."""
        return round(int(self.fixup_w1.shape[0]) ** 0.5)

    @property
    def radius(self) -> int:
        """Reach of the kernel in pixels."""
        return self.diameter // 2


def reflect_pad(x: Tensor, radius: int) -> Tensor:
    """Pads the last two axes by reflection, ``radius`` pixels on every side.

    PyTorch's own reflection needs more pixels than padding. For smaller maps the reflection is
    reflected again (NumPy's rule), and a single row or column is repeated.
    """
    height, width = x.shape[-2:]
    # Symbolic sizes are not compared: a comparison would limit a program to small maps like its
    # example.
    if isinstance(height, int) and isinstance(width, int) and height > radius and width > radius:
        return F.pad(x, (radius, radius, radius, radius), mode="reflect")
    return mirror(mirror(x, radius, 2), radius, 3)


def mirror(x: Tensor, radius: int, axis: int) -> Tensor:
    """Does :func:`reflect_pad` on one axis, by indices that work with symbolic sizes."""
    last = x.shape[axis] - 1
    place = torch.arange(x.shape[axis] + 2 * radius, device=x.device) - radius
    # Mirror images repeat after twice the last place. As a tensor: ONNX has no remainder by a
    # number that depends on the image's size.
    period = (2 * (place[-1:] - radius)).clamp(min=1)
    place = torch.remainder(place, period)
    return x.index_select(axis, last - (last - place).abs())


def _for_rows(compare: Callable[[Tensor], Tensor], x: Tensor, radius: int) -> Tensor:
    """Applies a function to the D neighbours in each of D rows of taps, (B, C, H, W, D).

    The function returns (B, H, W, D); the result is (B, D², H, W).
    """
    columns = reflect_pad(x, radius).unfold(3, 2 * radius + 1, 1)
    # Contiguous: PyTorch compares the sizes of overlapping axes, which limits an exported program.
    rows = (columns.narrow(2, dy, x.shape[2]).contiguous() for dy in range(2 * radius + 1))
    return torch.cat([compare(row) for row in rows], dim=3).permute(0, 3, 1, 2)


def pool_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Resizes an image as ``adaptive_avg_pool2d`` does, by two matrix products.

    :math:`g = A_h\, x\, A_w^\top`, where row i of A averages the pixels from
    :math:`\lfloor i n / N \rfloor` up to :math:`\lceil (i + 1) n / N \rceil`. The rule also holds
    if N > n, and the products compile and export with symbolic sizes.
    """
    rows, columns = pooling_matrices(image.shape[-2:], size, image)
    return torch.matmul(torch.matmul(rows, image), columns.t())


def pooling_matrices(size_in: Sequence[int], size_out: Sequence[int], like: Tensor) -> list[Tensor]:
    """Returns the matrices of :func:`pool_guidance` for rows and columns."""
    return [_pooling_matrix(n, m, like) for n, m in zip(size_in, size_out, strict=True)]


def _pooling_matrix(size_in: int, size_out: int, like: Tensor) -> Tensor:
    out = torch.arange(size_out, device=like.device)
    column = torch.arange(size_in, device=like.device)
    start = (out * size_in) // size_out
    stop = ((out + 1) * size_in + size_out - 1) // size_out
    inside = (column >= start[:, None]) & (column < stop[:, None])
    return inside.to(like.dtype) / (stop - start).to(like.dtype)[:, None]


def spatial_logits(sigma: Tensor, diameter: int) -> Tensor:
    r"""Returns :math:`-|t|^2 / 2\sigma^2` for every tap, the kernel spanning [-1, 1], (D²,)."""
    axis = torch.linspace(-1, 1, diameter, dtype=sigma.dtype, device=sigma.device)
    squares = axis.square()
    # A product: Inductor fails to lower the power of a parameter that it folded to a constant.
    return -(squares[:, None] + squares[None, :]).reshape(-1) / (2 * sigma * sigma)


def jbu_kernel(guidance: Tensor, weights: StageWeights) -> Tensor:
    r"""Predicts one kernel per pixel from the guidance.

    .. math::
        k_t = \operatorname{softmax}_t(T \langle p_0, p_t \rangle - |t|^2 / 2\sigma^2)
              + 0.1\, m(k, g)_t

    p is a two-layer projection of the guidance, reflect-padded; T = exp(range_temp), clamped to
    [1e-4, 1e4]. The learned correction m is not renormalised: taps may be negative and need not sum
    to one. If the product of spatial and range term sums to less than 1e-7, the sum is clamped to
    1e-7, as upstream does.

    Args:
        guidance: The image at the stage's output size, (B, G, H, W).
        weights: The stage's parameters.

    Returns:
        Kernels, (B, D², H, W), taps row-major: t = D·dy + dx.
    """
    w = weights

    hidden = F.gelu(F.conv2d(guidance, w.range_w0[:, :, None, None], w.range_b0))
    projection = F.conv2d(hidden, w.range_w1[:, :, None, None], w.range_b1)
    centre = projection[..., None]
    logits = _for_rows(lambda row: (row * centre).sum(1), projection, w.radius)
    temperature = w.range_temp.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
    spatial = spatial_logits(w.sigma_spatial, w.diameter).exp()
    kernel = F.softmax(temperature * logits, dim=1) * spatial[:, None, None]
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=MIN_SUM)

    features = torch.cat([kernel, guidance], dim=1)
    hidden = F.gelu(F.conv2d(features, w.fixup_w0[:, :, None, None], w.fixup_b0))
    correction = F.conv2d(hidden, w.fixup_w1[:, :, None, None], w.fixup_b1)
    return kernel + FIXUP_SCALE * correction


def joint_kernel(
    query: Tensor,
    key: Tensor,
    spatial: Tensor,
    range: Tensor,
    cells: tuple[int, int],
    radius: int,
) -> Tensor:
    r"""Weights the cells around every pixel by how near they lie and how alike they look.

    .. math::
        k_t(u) = \operatorname{softmax}_t(-|p_u - p_{c(u+t)}|^2 / 2\sigma^2
                 - |q_u - k_{c(u+t)}|^2 / 2\tau^2)

    c(v) is the cell of pixel v, and p are positions in cells of the source.

    Args:
        query: Looks of the pixels, (B, E, H, W).
        key: Looks of the cells, (B, E, h, w), with h ≤ H and w ≤ W.
        spatial: Width σ, (); its absolute value is used, at least 1e-3.
        range: Width τ, (), likewise.
        cells: Height and width of the source.
        radius: Reach of the kernels, in pixels.

    Returns:
        Kernels, (B, D², H, W), taps row-major; they sum to one.
    """
    asked, had = joint_features(query, key, spatial, range, cells)
    asked = asked[..., None]
    return _for_rows(lambda row: -0.5 * (asked - row).square().sum(1), had, radius).softmax(1)


def joint_features(
    query: Tensor, key: Tensor, spatial: Tensor, range: Tensor, cells: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Returns positions and embeddings of pixels and of their cells, divided by the widths.

    Half the squared distance of two of them is the exponent of :func:`joint_kernel`.
    """
    near, alike = (width.abs().clamp(min=MIN_WIDTH) for width in (spatial, range))
    asked, had = (torch.cat([_places(x, cells) / near, x / alike], dim=1) for x in (query, key))
    return asked, repeat(had, (query.shape[2], query.shape[3]))


def _places(x: Tensor, cells: tuple[int, int]) -> Tensor:
    """Returns the rows and columns of a map's pixels on the source's grid, (B, 2, H, W)."""
    batch, _, height, width = x.shape
    # Multiplies before dividing, so that symbolic sizes stay symbolic.
    rows, columns = (
        (torch.arange(count, device=x.device) + 0.5).to(x) * cell / count
        for cell, count in zip(cells, (height, width), strict=True)
    )
    grid = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])
    return grid.expand(batch, -1, -1, -1)


def repeat(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Gives every pixel its cell's value, (B, C, h, w) -> (B, C, *size)."""
    for axis, count in zip((2, 3), size, strict=True):
        cells = cells.index_select(axis, cell_of_pixel(cells.shape[axis], count, cells))
    return cells


def cell_of_pixel(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Returns the cell, of n, that contains the centre of each of N pixels, (N,)."""
    twice = torch.arange(1, 2 * pixels, 2, device=like.device)  # of the pixels' centres
    return twice * cells // (2 * pixels)


def jbu_apply(source: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Resizes the source to the kernels' size and filters it, every channel alike.

    .. math:: y(u) = \sum_t k_t(u)\, \mathrm{pad}(\mathrm{bicubic}(source))(u + t) + b

    Bicubic is PyTorch's: a = -0.75, ``align_corners=False``, borders clamped; the result is
    reflect-padded by the kernel's radius.

    Args:
        source: Low-resolution features, (B, C, h, w).
        kernel: Kernels, (B, D², H, W).
        bias: Added to every output pixel, (C,).

    Returns:
        Features, (B, C, H, W).
    """
    size = (kernel.shape[-2], kernel.shape[-1])
    diameter = round(int(kernel.shape[1]) ** 0.5)
    resized = F.interpolate(source, size, mode="bicubic", align_corners=False)
    padded = reflect_pad(resized, diameter // 2)
    output = torch.zeros_like(resized)
    if exporting() and isinstance(size[0], torch.SymInt):
        # One operator with a loop inside: 49 taps with symbolic sizes take a minute to export.
        from torch._higher_order_ops.scan import scan

        place = torch.arange(size[0], device=kernel.device)

        def step(total: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            near = padded.index_select(2, place + row[1])
            return _add_row(total, row[0], near), total.new_zeros(())  # scan asks for an output

        rows = kernel.unflatten(1, (diameter, diameter)).transpose(0, 1)
        output, _ = scan(step, output, (rows, torch.arange(diameter, device=kernel.device)))
    else:
        for dy, taps in enumerate(kernel.split(diameter, dim=1)):
            output = _add_row(output, taps, padded[:, :, dy : dy + size[0]])
    return output if bias is None else output + bias[:, None, None]


def exporting() -> bool:
    """Returns whether a program is being exported, for any sizes."""
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())  # since torch 2.7


def _add_row(total: Tensor, taps: Tensor, rows: Tensor) -> Tensor:
    """Adds a row of taps, (B, D, H, W), times the pixels at them, rows of (B, C, H, W + D - 1)."""
    width = total.shape[3]
    for dx in range(taps.shape[1]):
        total = torch.addcmul(total, taps.narrow(1, dx, 1), rows.narrow(3, dx, width))
    return total
