"""FeatUp's JBU upsampler: a stack of learned joint bilateral stages guided by the image.

The stages look at colours only and filter every feature channel alike, so one set of stages
serves any backbone. Parameter names are upstream's, whose checkpoints load strictly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; names and
numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops import Implementation, jbu_apply, pool_guidance
from featup_hub.ops.jbu import _without_autocast, check_floating
from featup_hub.upsamplers.head import FoldedHead
from featup_hub.upsamplers.joint import JointBilateralStage, JointKernels
from featup_hub.upsamplers.kernels import JBUKernels
from featup_hub.upsamplers.pretrained import Pretrained
from featup_hub.upsamplers.sizes import stage_sizes
from featup_hub.upsamplers.stage import JBUStage, pass_stages

__all__ = ["JBUStack"]

_MOST_STAGES = 16  # of any file, 65,536-fold; what names more is damaged


class JBUStack(Pretrained):
    """Upsamples features to the image's resolution by joint bilateral stages.

    With n stages to pass (see :func:`stage_sizes`) the last is always the last of ``up1..upN``:
    weights belong to a guidance resolution relative to the output. Where fewer are needed the
    first ones are left out, where more are needed ``up1`` repeats.

    In lower precision: under autocast the way from guidance to kernels stays in float32. Whole
    modules can be converted, too: with random features and a photograph at 14²→224²
    ``jbu_universal`` then errs by 0.40 % (``.bfloat16()``) and 0.05 % (``.half()``), root mean
    square.

    Training works under ``torch.use_deterministic_algorithms``: with plain PyTorch no operation,
    forward or backward, is one that it refuses, save with ``impl="reference"`` on a GPU.

    Args:
        feat_dim: Channels of the features. Adds upstream's closing 1×1 convolution,
            ``out = x + 0.1·conv(x)``, which fits one backbone; None leaves the stages alone,
            which fit any.
        num_stages: Number of stages with weights of their own.
        guidance_dim: Channels of the guidance.
        key_dim: Channels in which neighbouring pixels are compared.
        radius: Reach of the kernels.
        dropout: Chance of dropping a hidden channel while training; twice that for a feature
            channel before the closing convolution.
        joint_first: Whether the first stage passed, and ``up1`` wherever it repeats, has a
            :class:`JointBilateralStage` beside it, which compares pixels with cells.

    Example:
        >>> upsampler = JBUStack().eval()
        >>> source, image = torch.randn(1, 5, 2, 3), torch.randn(1, 3, 32, 48)
        >>> upsampler(source, image).shape
        torch.Size([1, 5, 32, 48])
    """

    def __init__(
        self,
        feat_dim: int | None = None,
        *,
        num_stages: int = 4,
        guidance_dim: int = 3,
        key_dim: int = 32,
        radius: int = 3,
        dropout: float = 0.1,
        joint_first: bool = False,
    ) -> None:
        super().__init__()
        if num_stages < 1:
            raise ValueError(f"num_stages must be at least 1; got {num_stages}")
        self.feat_dim = feat_dim
        self.num_stages = num_stages
        self.guidance_dim = guidance_dim
        self.key_dim = key_dim
        self.radius = radius
        self.dropout = dropout
        self.joint_first = joint_first
        self.first = JointBilateralStage(guidance_dim, radius) if joint_first else None
        for index in range(num_stages):
            stage = JBUStage(guidance_dim, key_dim, radius, dropout=dropout)
            self.add_module(f"up{index + 1}", stage)
        self.fixup_proj: nn.Sequential | None = None
        if feat_dim is not None:
            conv = nn.Conv2d(feat_dim, feat_dim, 1)
            self.fixup_proj = nn.Sequential(nn.Dropout2d(2 * dropout), conv)

    @classmethod
    def fitting(cls, tensors: Mapping[str, Tensor]) -> JBUStack:
        """Makes a stack that tensors of a file fit: their stages, their channels.

        Args:
            tensors: By the names of a ``state_dict``, such as ``up1.range_temp``.

        Returns:
            The stack, on the meta device: to be filled by what checks every name and shape. Four
            stages without a closing convolution where the tensors tell of neither.
        """
        count = 0
        while count < _MOST_STAGES and any(n.startswith(f"up{count + 1}.") for n in tensors):
            count += 1
        closing = tensors.get("fixup_proj.1.weight")
        with torch.device("meta"):
            return cls(
                closing.shape[0] if closing is not None and closing.dim() == 4 else None,
                num_stages=count or 4,
                joint_first=any(name.startswith("first.") for name in tensors),
            )

    def stages(self, count: int) -> list[JBUStage]:
        """Returns the stages to pass through, in order, where ``count`` are needed."""
        stages: list[JBUStage] = [getattr(self, f"up{i + 1}") for i in range(self.num_stages)]
        return [stages[0]] * (count - self.num_stages) + stages[max(self.num_stages - count, 0) :]

    def forward(
        self,
        source: Tensor,
        guidance: Tensor,
        *,
        size: tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> Tensor:
        """Upsamples features under the guidance of their image.

        Args:
            source: Features, (B, C, h, w).
            guidance: The image, normalised RGB, (B, 3, H, W).
            size: Height and width wanted; default: the guidance's own. ``(16h, 16w)`` gives
                upstream's output.
            impl: Who computes, see :mod:`featup_hub.ops.jbu`.

        Returns:
            Features, (B, C, *size), in channels_last memory format where ``impl`` is fast.

        Raises:
            ValueError: If the shapes do not fit one another.
            TypeError: If there are integers in place of floating-point values.
        """
        self._check(source, guidance)
        first, plan = self._plan(_size(source), guidance, size, impl)
        if impl == "reference":
            source = self._pass_first(source, first, impl)
            del first
            for stage, pooled in plan:
                source = stage(source, pooled, impl=impl)
            return source if self.fixup_proj is None else source + 0.1 * self.fixup_proj(source)
        source, bias = self._before(source)
        source = self._pass_first(source, first, impl)
        del first
        # A generator, so that only one stage's kernels are alive at a time.
        return pass_stages(source, (s.kernel(g, impl=impl) for s, g in plan), len(plan), bias, impl)

    def kernels(
        self,
        guidance: Tensor,
        source_size: tuple[int, int],
        *,
        size: tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> JBUKernels:
        """Computes all kernels of an image once, for many feature maps of one size.

        Args:
            guidance: The image, (B, 3, H, W).
            source_size: Height and width of the features to come.
            size: Height and width wanted; default: the guidance's own.
            impl: Who computes.

        Returns:
            Kernels for :meth:`upsample`.
        """
        first, plan = self._plan(source_size, guidance, size, impl)
        kernels = tuple(stage.kernel(pooled, impl=impl) for stage, pooled in plan)
        return JBUKernels(source_size=source_size, stages=kernels, first=first)

    def upsample(
        self, source: Tensor, kernels: JBUKernels, *, impl: Implementation = "auto"
    ) -> Tensor:
        """Upsamples features with kernels computed before.

        Args:
            source: Features, (B, C, h, w).
            kernels: From :meth:`kernels`.
            impl: Who computes.

        Returns:
            Features at the size the kernels were computed for.

        Raises:
            ValueError: If the kernels were computed for features of another size, or by a stack of
                another kind.
        """
        kernels.check(_size(source), joint_first=self.joint_first)
        source, bias = self._before(source)
        source = self._pass_first(source, kernels.first, impl)
        return pass_stages(source, kernels.stages, len(kernels.stages), bias, impl)

    def pyramid(
        self, source: Tensor, kernels: JBUKernels, *, impl: Implementation = "auto"
    ) -> list[Tensor]:
        """Returns the features at every resolution on the way, the source's first.

        Args:
            source: Features, (B, C, h, w).
            kernels: From :meth:`kernels`.
            impl: Who computes.

        Returns:
            One map more than there are stages, the last being that of :meth:`upsample`. The
            closing convolution, where there is one, is in all of them.

        Raises:
            ValueError: If the kernels were computed for features of another size, or by a stack of
                another kind.

        Example:
            >>> upsampler, image = JBUStack().eval(), torch.randn(1, 3, 64, 96)
            >>> kernels = upsampler.kernels(image, (4, 6))
            >>> levels = upsampler.pyramid(torch.randn(1, 5, 4, 6), kernels)
            >>> [level.shape[-1] for level in levels]
            [6, 12, 24, 48, 96]
        """
        kernels.check(_size(source), joint_first=self.joint_first)
        source, bias = self._before(source)
        levels = [source]
        if self.first is not None and kernels.first is not None:
            levels += self.first.levels(source, kernels.first, impl=impl)
        for kernel in kernels.stages:
            levels.append(jbu_apply(levels[-1], kernel, impl=impl))
        return levels if bias is None else [level + bias[:, None, None] for level in levels]

    def fold_head(self, head: nn.Conv2d) -> FoldedHead:
        """Joins a linear head behind this upsampler, to be applied at low resolution.

        The stages are linear in the features and treat every channel alike, so a 1×1
        convolution commutes with them exactly: K classes are upsampled in place of C channels.

        Args:
            head: A 1×1 convolution from C features to K outputs.

        Returns:
            A module (source, guidance) -> (B, K, H, W) that shares this module's and the
            head's parameters.
        """
        return FoldedHead(self, head)

    def _before(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """Applies the closing convolution, x + 0.1·(Wx + b), where it is cheap: beforehand.

        Returns what goes into the stages and the bias that joins behind them.
        """
        if self.fixup_proj is None:
            return source, None
        conv = cast(nn.Conv2d, self.fixup_proj[1])
        mixed = F.conv2d(self.fixup_proj[0](source), conv.weight)
        return source + 0.1 * mixed, 0.1 * cast(Tensor, conv.bias)

    def _plan(
        self,
        source_size: tuple[int, int],
        guidance: Tensor,
        size: tuple[int, int] | None,
        impl: Implementation,
    ) -> tuple[JointKernels | None, list[tuple[JBUStage, Tensor]]]:
        """Returns the kernels of the joint bilateral stage, and the stages to pass behind it.

        These are paired with their guidance, pooled in float32 or better.
        """
        check_floating(guidance, "guidance")
        sizes = stage_sizes(source_size, _size(guidance) if size is None else size)
        guidance = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
        with _without_autocast(guidance.device):
            pooled = [pool_guidance(guidance, stage_size) for stage_size in sizes]
            plan = list(zip(self.stages(len(sizes)), pooled, strict=True))
            if self.first is None or not plan:
                return None, plan
            joint = 1 + max(len(plan) - self.num_stages, 0)
            learned = [stage.kernel(image, impl=impl) for stage, image in plan[:joint]]
            return self.first.kernels(guidance, source_size, learned), plan[joint:]

    def _pass_first(
        self, source: Tensor, kernels: JointKernels | None, impl: Implementation
    ) -> Tensor:
        """Passes the joint bilateral stage, where there is one and anything to be done."""
        if self.first is None or kernels is None:
            return source
        return cast(Tensor, self.first(source, kernels, impl=impl))

    def _check(self, source: Tensor, guidance: Tensor) -> None:
        if guidance.dim() != 4 or guidance.shape[1] != self.guidance_dim:
            raise ValueError(
                f"guidance must be an image, (B, {self.guidance_dim}, H, W); "
                f"got {tuple(guidance.shape)}, were source and guidance swapped?"
            )
        if source.dim() != 4 or source.shape[0] != guidance.shape[0]:
            raise ValueError(
                f"source must be features, (B, C, h, w), with the guidance's batch size "
                f"{guidance.shape[0]}; got {tuple(source.shape)}"
            )
        if self.feat_dim is not None and source.shape[1] != self.feat_dim:
            raise ValueError(
                f"this upsampler was made for {self.feat_dim} channels; got {source.shape[1]}; "
                "use JBUStack(feat_dim=None), whose stages fit any number"
            )


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
