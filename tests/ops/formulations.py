"""JBU written a second time, from FeatUp's equations, by unfolding: the oracle of these tests.

It shares no code with the package: neighbourhoods are unfolded, 1×1 convolutions are einsums,
padding is NumPy's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def neighbourhoods(x: Tensor, diameter: int) -> Tensor:
    """(B, C, H, W) -> (B, C, D², H, W), mirrored beyond the border as NumPy mirrors."""
    r = diameter // 2
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(n), r, mode="reflect" if n > 1 else "edge"))
        for n in x.shape[-2:]
    )
    padded = x[:, :, rows[:, None], columns[None, :]]
    batch, channels, height, width = x.shape
    return F.unfold(padded, diameter).view(batch, channels, diameter**2, height, width)


def pointwise(block: torch.nn.Module, x: Tensor) -> Tensor:
    """The two 1×1 convolutions of a projection, with dropout asleep."""
    first, second = block[0], block[3]
    hidden = torch.einsum("oi,bihw->bohw", first.weight[:, :, 0, 0], x)
    hidden = hidden + first.bias[:, None, None]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    out = torch.einsum("oi,bihw->bohw", second.weight[:, :, 0, 0], hidden)
    return out + second.bias[:, None, None]


def stage_kernel(stage: torch.nn.Module, guidance: Tensor) -> Tensor:
    """One stage's kernels, (B, D², H, W)."""
    diameter = round(stage.fixup_proj[3].weight.shape[0] ** 0.5)
    query = pointwise(stage.range_proj, guidance)
    keys = neighbourhoods(query, diameter)
    temperature = stage.range_temp.exp().clamp(1e-4, 1e4)
    range_kernel = torch.einsum("bcphw,bchw->bphw", keys, query).mul(temperature).softmax(1)
    axis = torch.linspace(-1, 1, diameter, dtype=guidance.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    spatial = torch.exp(-(x**2 + y**2) / (2 * stage.sigma_spatial**2)).flatten()
    kernel = range_kernel * spatial[:, None, None]
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
    return kernel + 0.1 * pointwise(stage.fixup_proj, torch.cat([kernel, guidance], 1))


def stage_apply(source: Tensor, kernel: Tensor) -> Tensor:
    """Bicubic, unfold, weighted sum."""
    size = kernel.shape[-2:]
    resized = F.interpolate(source, size, mode="bicubic", align_corners=False)
    return torch.einsum(
        "bcphw,bphw->bchw", neighbourhoods(resized, round(kernel.shape[1] ** 0.5)), kernel
    )


def stack_forward(
    stack: torch.nn.Module, source: Tensor, image: Tensor, sizes: list[tuple[int, int]]
) -> Tensor:
    """The whole stack through its four stages at the given sizes, closing convolution last."""
    for stage, size in zip((stack.up1, stack.up2, stack.up3, stack.up4), sizes, strict=True):
        guidance = F.adaptive_avg_pool2d(image, size)
        source = stage_apply(source, stage_kernel(stage, guidance))
    if stack.fixup_proj is None:
        return source
    conv = stack.fixup_proj[1]
    mixed = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], source)
    return source + 0.1 * (mixed + conv.bias[:, None, None])


@torch.no_grad()
def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Draws parameters far from their initial values, so that every term matters."""
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.normal_(0, 0.8 / fan_in**0.5)
        if name.endswith("sigma_spatial"):
            parameter.fill_(0.8)
    return module.eval()
