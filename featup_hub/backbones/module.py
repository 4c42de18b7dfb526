"""Any network as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featup_hub.backbones.contract import Backbone
from featup_hub.registry import IMAGENET_MEAN, IMAGENET_STD

Layout = Literal["nchw", "nhwc"]
# Keys of the spatial features in the dictionaries of DINOv2, Hugging Face Transformers and
# torchvision.
_NAMES = ("x_norm_patchtokens", "feature_maps", "last_hidden_state", "out")


class ModuleBackbone(Backbone):
    """Wraps a network that computes features of an image.

    The network may return maps, (B, C, h, w) or (B, h, w, C), or tokens, (B, N, C) or (B, C, N) in
    row-major order after any class and register tokens. They may be the output itself, the last
    entry of a list or tuple, or in a dictionary or an output of Hugging Face Transformers. Every
    call checks the shape.

    Args:
        module: The network; it is called with the image.
        feat_dim: Channels of its features.
        patch_size: Their stride in pixels.
        prefix_tokens: Class and register tokens to leave out.
        layout: Where the channels are: ``"nchw"``, first, or ``"nhwc"``, last. By default the shape
            decides. An ambiguous one, such as 96×96 cells, or 96 tokens, with 96 channels, is
            decided by a test with a smaller image.
        mean, std, in_chans, fixed_size: As for :class:`Backbone`.
        call: How to call the network, in place of ``module(image)``.

    Example:
        >>> import torch
        >>> cnn = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
        >>> ModuleBackbone(cnn, feat_dim=8, patch_size=4)(torch.randn(1, 3, 32, 30)).shape
        torch.Size([1, 8, 8, 8])

        DINOv2 from torch.hub, by the method that returns patch tokens::

            dino = torch.hub.load("facebookresearch/dinov2", "dinov2_vits14")
            backbone = ModuleBackbone(
                dino, feat_dim=384, patch_size=14, call=lambda m, x: m.forward_features(x)
            )
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        feat_dim: int,
        patch_size: int,
        prefix_tokens: int = 0,
        layout: Layout | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        in_chans: int = 3,
        fixed_size: tuple[int, int] | None = None,
        call: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        if layout not in (None, "nchw", "nhwc"):
            raise ValueError(f"layout must be 'nchw' or 'nhwc'; got {layout!r}")
        super().__init__(
            feat_dim=feat_dim,
            patch_size=patch_size,
            mean=mean,
            std=std,
            in_chans=in_chans,
            fixed_size=fixed_size,
        )
        self.module = module
        self.prefix_tokens = prefix_tokens
        self.layout = layout
        self.call = call

    def features(self, image: Tensor) -> Tensor:
        """Calls the network and converts its output to (B, C, h, w)."""
        features, grid = self._call(image), self._grid(image)
        layouts = [self.layout] if self.layout else self._layouts(features, grid)
        if len(layouts) == 2:
            self.layout = self._decided(image)
            layouts = [self.layout]
        is_tokens = features.dim() == 3
        if layouts == ["nhwc"] or (is_tokens and not layouts):
            features = features.movedim(-1, 1)
        if is_tokens:
            if features.shape[2] - self.prefix_tokens != grid[0] * grid[1]:
                raise ValueError(
                    f"needed {grid[0]}×{grid[1]} tokens after {self.prefix_tokens} others; got "
                    f"{features.shape[2]} in all; set prefix_tokens to the number of class and "
                    "register tokens, or correct patch_size"
                )
            features = features[:, :, self.prefix_tokens :].unflatten(2, grid)
        if tuple(features.shape[1:]) != (self.feat_dim, *grid):
            raise ValueError(
                f"needed features (B, {self.feat_dim}, {grid[0]}, {grid[1]}), as feat_dim and "
                f"patch_size announce for an image of {tuple(image.shape[2:])}; got "
                f"{tuple(features.shape)}; correct them, or select the features with call. A "
                "convolution without padding loses cells at the edges: pad the image in call"
            )
        return features

    def _call(self, image: Tensor) -> Tensor:
        return _tensor(self.module(image) if self.call is None else self.call(self.module, image))

    def _grid(self, image: Tensor) -> tuple[int, int]:
        return image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size

    def _layouts(self, features: Tensor, grid: tuple[int, int]) -> list[Layout]:
        """Lists the layouts that the shape of a map, or of tokens, allows."""
        shape = tuple(features.shape[1:])
        places = grid if len(shape) == 3 else (self.prefix_tokens + grid[0] * grid[1],)
        shapes: dict[Layout, tuple[int, ...]] = {
            "nchw": (self.feat_dim, *places),
            "nhwc": (*places, self.feat_dim),
        }
        return [layout for layout, due in shapes.items() if shape == due]

    @torch.no_grad()
    def _decided(self, image: Tensor) -> Layout:
        """Decides an ambiguous layout by a test with one row of patches less."""
        found: list[Layout] = []
        if self.fixed_size is None and image.shape[-2] > self.patch_size:
            smaller = image[:1, :, : -self.patch_size]
            found = self._layouts(self._call(smaller), self._grid(smaller))
        if len(found) != 1:
            raise ValueError(
                f"features of {self.feat_dim} channels and as many rows and columns, or tokens, "
                "can have the channels first or last; say which: layout='nchw' or layout='nhwc'"
            )
        return found[0]


def _tensor(output: object) -> Tensor:
    """Finds the features in a network's output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if len(output) == 1:
            return _tensor(next(iter(output.values())))
        for name in _NAMES:
            if name in output:
                return _tensor(output[name])
        got = f"a dictionary of {', '.join(map(str, output))}"
    elif isinstance(output, (list, tuple)) and output:
        return _tensor(output[-1])
    else:
        got = f"{type(output).__name__}"
    raise TypeError(
        f"needed a tensor of features, a sequence that ends in one, or a dictionary with one of "
        f"{', '.join(_NAMES)}; got {got}; select the features with call"
    )
