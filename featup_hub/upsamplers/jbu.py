"""FeatUp's JBU upsampler: a stack of learned joint bilateral stages guided by the image.

The stages read only colours and filter every feature channel alike, so one set of stages fits any
backbone. Parameter names are upstream's, so its checkpoints load strictly.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; names and
numbers agree with mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featup_hub.ops import Implementation, jbu_apply, pool_guidance
from featup_hub.ops.jbu import check_numbers, warn_unless_normalised, without_autocast
from featup_hub.upsamplers.head import FoldedHead, apply_head, check_head
from featup_hub.upsamplers.joint import JointBilateralStage, JointKernels
from featup_hub.upsamplers.plan import (
    JBUKernels,
    JBUPlan,
    check_arguments,
    check_kernels,
    halved,
    plan_sizes,
)
from featup_hub.upsamplers.pretrained import Pretrained
from featup_hub.upsamplers.stage import JBUStage, has_zero_mean, stage_weights


class JBUStack(Pretrained):
    """Upsamples features to the image's resolution by joint bilateral stages.

    The last stage is always the last of ``up1..upN``, because weights belong to a guidance
    resolution relative to the output. If fewer stages are needed (see :func:`stage_sizes`), the
    first ones are left out; if more are needed, ``up1`` repeats. With ``joint_first``
    and at least two stages, an output of at most half the image's size has one stage more: it
    equals the output of twice its size, averaged over squares of 2×2 pixels. FeatUp's
    checkpoints keep FeatUp's output.

    Under autocast kernels are computed in float32. A module converted with ``.bfloat16()`` or
    ``.half()`` has a relative root mean square error of 0.40 % or 0.05 % (``jbu_denoise``, random
    features and a photograph at 14²→224²). Training works under
    ``torch.use_deterministic_algorithms``, except with ``impl="reference"`` on a GPU.

    Args:
        feat_dim: Channels of the features. Adds upstream's closing 1×1 convolution,
            ``out = x + 0.1·conv(x)``, which fits one backbone; None: only the stages, which fit any
            backbone.
        num_stages: Number of stages with weights of their own.
        guidance_dim: Channels of the guidance.
        key_dim: Channels in which neighbouring pixels are compared.
        radius: Reach of the kernels.
        dropout: Probability of dropping a hidden channel in training; doubled for a feature channel
            before the closing convolution.
        joint_first: Whether the first stage in use, and every repeat of ``up1``, is combined with a
            :class:`JointBilateralStage`, which compares pixels with cells.
        unit_sum: Whether kernels sum to one, also in training, so that constant features stay
            constant. Upstream's do not.
        looks_per_side: k, for sources of k² looks, see
            :class:`~featup_hub.backbones.ShiftAndStitch`, which the joint bilateral stage smooths
            separately. :class:`~featup_hub.UpsampledBackbone` copies its backbone's.

    Example:
        >>> upsampler = JBUStack().eval()
        >>> source, image = torch.randn(1, 5, 2, 3), torch.randn(1, 3, 32, 48)
        >>> upsampler(source, image).shape
        torch.Size([1, 5, 32, 48])
    """

    _range_checked = False  # whether a first image was looked at

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
        unit_sum: bool = False,
        looks_per_side: int = 1,
    ) -> None:
        super().__init__()
        check_numbers(1, num_stages=num_stages, guidance_dim=guidance_dim, key_dim=key_dim)
        check_numbers(1, feat_dim=1 if feat_dim is None else feat_dim)
        check_numbers(1, looks_per_side=looks_per_side)
        check_numbers(0, radius=radius)
        self.feat_dim, self.num_stages = feat_dim, num_stages
        self.guidance_dim, self.key_dim, self.radius = guidance_dim, key_dim, radius
        self.dropout, self.joint_first, self.unit_sum = dropout, joint_first, unit_sum
        self.looks_per_side = looks_per_side
        self.first = JointBilateralStage(guidance_dim, radius) if joint_first else None
        for index in range(num_stages):
            stage = JBUStage(guidance_dim, key_dim, radius, dropout=dropout, unit_sum=unit_sum)
            self.add_module(f"up{index + 1}", stage)
        self.fixup_proj: nn.Sequential | None = None
        if feat_dim is not None:
            conv = nn.Conv2d(feat_dim, feat_dim, 1)
            self.fixup_proj = nn.Sequential(nn.Dropout2d(2 * dropout), conv)

    @classmethod
    def fitting(cls, tensors: Mapping[str, Tensor], *, looks_per_side: int = 1) -> JBUStack:
        """Makes a stack, on the meta device, for tensors by ``state_dict`` names.

        It has their stages and closing convolution (four stages if there are none), and keeps the
        sums of its kernels at one in training if the tensors' kernels sum to one.
        """
        parts = {name.partition(".")[0] for name in tensors}
        closing = tensors.get("fixup_proj.1.weight")
        corrections = [tensor for name, tensor in tensors.items() if ".fixup_proj.3." in name]
        with torch.device("meta"):
            return cls(
                closing.shape[0] if closing is not None and closing.dim() == 4 else None,
                num_stages=sum(part.startswith("up") for part in parts) or 4,
                joint_first="first" in parts,
                unit_sum=bool(corrections) and all(map(has_zero_mean, corrections)),
                looks_per_side=looks_per_side,
            )

    def stages(self, count: int) -> list[JBUStage]:
        """Returns the ``count`` stages in use, in order."""
        stages: list[JBUStage] = [getattr(self, f"up{i + 1}") for i in range(self.num_stages)]
        return [stages[0]] * (count - self.num_stages) + stages[max(self.num_stages - count, 0) :]

    def forward(
        self,
        source: Tensor,
        guidance: Tensor,
        *,
        size: int | tuple[int, int] | None = None,
        impl: Implementation = "auto",
        head: nn.Module | None = None,
    ) -> Tensor:
        """Upsamples features under the guidance of their image.

        Args:
            source: Features, (B, C, h, w).
            guidance: The image, normalised RGB, (B, 3, H, W).
            size: Height and width wanted, or the length of the short side; default: the guidance's
                own. ``(16h, 16w)`` gives upstream's output.
            impl: Implementation, see :mod:`featup_hub.ops.jbu`.
            head: A linear head to apply, see :meth:`fold_head`.

        Returns:
            Features, ``(B, C, *size)``, or the head's outputs; in channels_last memory format for
            the fast ``impl``.
        """
        self.check(source, guidance)
        # is_compiling() comes first, so that no compiled graph depends on the attribute.
        if not torch.compiler.is_compiling() and not self._range_checked:
            self._range_checked = warn_unless_normalised(guidance)
        if head is not None:
            check_head(head, source.shape[1])
        plan = self.plan(guidance, (source.shape[2], source.shape[3]), size=size, impl=impl)
        # A generator, so that only one stage's kernels are in memory at a time.
        kernels = (predict(pooled) for predict, pooled in plan.stages)
        return self._pass(source, plan, kernels, impl, head)

    def kernels(
        self,
        guidance: Tensor,
        source_size: tuple[int, int],
        *,
        size: int | tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> JBUKernels:
        """Computes all kernels of an image once, for :meth:`upsample` and :meth:`pyramid`.

        ``source_size`` is the height and width of the features; the rest as in :meth:`forward`.
        """
        plan = self.plan(guidance, source_size, size=size, impl=impl)
        return JBUKernels(
            source_size=(source_size[0], source_size[1]),
            stages=tuple(predict(pooled) for predict, pooled in plan.stages),
            first=plan.first,
        )

    def upsample(
        self, source: Tensor, kernels: JBUKernels, *, impl: Implementation = "auto"
    ) -> Tensor:
        """Upsamples features, (B, C, h, w), with kernels of :meth:`kernels`.

        Raises:
            ValueError: If the kernels were computed for features of another size, or by a stack of
                another kind.
        """
        check_kernels(kernels, source, joint_first=self.joint_first)
        return self._pass(source, kernels, kernels.stages, impl)

    def pyramid(
        self, source: Tensor, kernels: JBUKernels, *, impl: Implementation = "auto"
    ) -> list[Tensor]:
        """Returns the features at every resolution, from the source's to the output's.

        Arguments and errors are those of :meth:`upsample`, which the last map equals. All maps
        include the closing convolution, if there is one.
        """
        check_kernels(kernels, source, joint_first=self.joint_first)
        source, bias = self.before(source)
        levels = [source]
        if self.first is not None and kernels.first is not None:
            levels += self.first.levels(source, kernels.first, impl=impl)
        for kernel in kernels.stages:
            levels.append(jbu_apply(levels[-1], kernel, impl=impl))
        return levels if bias is None else [level + bias[:, None, None] for level in levels]

    def fold_head(self, head: nn.Module) -> FoldedHead:
        """Adds a linear head and applies it at low resolution, so only K channels are upsampled.

        This is exact: the stages are linear in the features and treat every channel alike.

        Takes an ``nn.Linear`` or a 1×1 ``nn.Conv2d``, from C features to K outputs. Returns a
        module (source, guidance) -> (B, K, H, W) that shares this module's and the head's
        parameters.

        Example:
            >>> segment = JBUStack().eval().fold_head(nn.Linear(5, 2))
            >>> segment(torch.randn(1, 5, 2, 3), torch.randn(1, 3, 32, 48)).shape
            torch.Size([1, 2, 32, 48])
        """
        return FoldedHead(self, head)

    def check(self, source: Tensor, guidance: Tensor) -> None:
        """Raises an error unless the arguments are features for this stack, and their image."""
        check_arguments(source, guidance, guidance_dim=self.guidance_dim, feat_dim=self.feat_dim)

    def plan(
        self,
        guidance: Tensor,
        source_size: tuple[int, int],
        *,
        size: int | tuple[int, int] | None = None,
        impl: Implementation = "auto",
    ) -> JBUPlan:
        """Chooses the stages for arguments of :meth:`kernels`, and pools the image for each."""
        # A single stage may belong to the joint bilateral stage, which cannot be halved.
        may_halve = self.joint_first and self.num_stages > 1
        size, sizes, halve = plan_sizes(source_size, guidance, size, may_halve=may_halve)
        guidance = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
        with without_autocast(guidance.device):
            chosen = self.stages(len(sizes))
            stages: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
                (partial(stage.kernel, weights=weights, impl=impl), pool_guidance(guidance, at))
                for stage, weights, at in zip(chosen, stage_weights(chosen), sizes, strict=True)
            ]
            if self.first is None or not stages:
                return JBUPlan(size=size, first=None, stages=stages, halved=False)
            joint = 1 + max(len(stages) - self.num_stages, 0)
            learned = [predict(image) for predict, image in stages[:joint]]
            first = self.first.kernels(
                guidance, source_size, learned, looks_per_side=self.looks_per_side, impl=impl
            )
        if halve:
            predict, image = stages.pop()
            stages.append((lambda image: halved(predict(image)), image))
        return JBUPlan(size=size, first=first, stages=stages[joint:], halved=halve)

    def before(self, source: Tensor, head: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
        """Applies the closing convolution, x + 0.1·(Wx + b), and a head at low resolution.

        Returns the input of the stages, and the bias to add after them.
        """
        bias: Tensor | None = None
        if self.fixup_proj is not None:
            conv = cast(nn.Conv2d, self.fixup_proj[1])
            source = source + 0.1 * F.conv2d(self.fixup_proj[0](source), conv.weight)
            bias = 0.1 * cast(Tensor, conv.bias)
        return (source, bias) if head is None else apply_head(head, source, bias)

    def pass_first(
        self, source: Tensor, kernels: JointKernels | None, *, impl: Implementation = "auto"
    ) -> Tensor:
        """Applies the joint bilateral stage, if there is one and a stage is needed."""
        if self.first is None or kernels is None:
            return source
        return cast(Tensor, self.first(source, kernels, impl=impl))

    def _pass(
        self,
        source: Tensor,
        plan: JBUPlan | JBUKernels,
        kernels: Iterable[Tensor],
        impl: Implementation,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Applies all stages; the last one adds the bias."""
        source, bias = self.before(source, head)
        source = self.pass_first(source, plan.first, impl=impl)
        count = len(plan.stages)
        for index, kernel in enumerate(kernels, start=1):
            source = jbu_apply(source, kernel, bias if index == count else None, impl=impl)
        if bias is not None and not count:
            source = source + bias[:, None, None]
        return source
