"""Upsamplers that take part in an evaluation, by name, by file or by plug-in.

* ``nearest``, ``bilinear``, ``bicubic``, ``joint_bilateral`` – the package's baselines;
* ``jbu_denoise``, ``jbu_faithful`` – the upsamplers that are shipped;
* ``FILE`` – the stages of a JBU weights file (safetensors, or upstream's checkpoint);
* ``FILE@unit`` – the same with every kernel divided by its sum;
* ``module:callable`` – anything ``f(source (B,C,h,w), image (B,3,H,W) normalised, size)``.

``NAME=`` in front of any of them sets its name in tables.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from featup_hub.registry import UPSAMPLERS
from featup_hub.upsamplers import JBUStack, baselines
from featup_hub.weights import convert_upstream, digest, load_into, read, resolve

Head = Literal["before", "inside", "after"]
BASELINES = ("nearest", "bilinear", "bicubic", "joint_bilateral")
MIN_SUM = 0.05
STACK_CODE = [
    Path(baselines.__file__).with_name(f"{name}.py") for name in ("jbu", "joint", "plan", "stage")
]
"""What stages compute with their weights."""


class UnknownUpsamplerError(ValueError):
    """No upsampler has this name, or a plug-in cannot be called."""


class PlugInError(Exception):
    """A plug-in raised its cause: a bug of the plug-in, so the command line shows tracebacks."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An upsampler in an evaluation.

    Attributes:
        name: Name in tables.
        function: (source (B, C, h, w), image (B, 3, H, W), size) -> (B, C, *size).
        head: Where a linear head W (K, C) may be applied. ``"after"`` is always right.
            ``"before"`` applies it to the source. This is much cheaper, and exact for upsamplers
            that are linear in the source and treat channels alike. ``"inside"`` is for plug-ins
            that apply it themselves, ``function(source, image, size, head=W)``, such as attention.
            A plug-in sets it as its attribute ``head``.
        identity: Digest of what it computes, the key of its sums on disk; None if unknown. A
            plug-in is known by its own file, not by the files that it loads.
        looks: Number of looks of the backbone at each image.
        takes_looks: Whether the function takes ``looks_per_side``.
    """

    name: str
    function: Callable[..., Tensor]
    head: Head = "after"
    identity: str | None = None
    looks: int = 1
    takes_looks: bool = False

    def with_looks(self, looks: int) -> Candidate:
        """Returns the upsampler for features of ``looks`` looks, a square number."""
        if looks == 1:
            return self
        function, identity = self.function, self.identity
        if self.takes_looks:
            function = partial(function, looks_per_side=isqrt(looks))
        identity = identity and f"{identity} ×{looks} alternate"  # as looks are mirrored
        name = f"{self.name} ×{looks}"
        return replace(self, name=name, looks=looks, function=function, identity=identity)

    def __call__(self, source: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsamples features, (B, C, h, w) -> (B, C, *size)."""
        return self.function(source, image, size)

    def project(
        self, source: Tensor, image: Tensor, size: tuple[int, int], weight: Tensor
    ) -> Tensor:
        """Upsamples features and applies a linear head, (B, C, h, w) -> (B, K, *size).

        The caller adds the bias afterwards. Kernels that do not sum to one then change the scores.
        """
        if self.head == "inside":
            return self.function(source, image, size, head=weight)
        if self.head == "before":
            return self.function(F.conv2d(source, weight[:, :, None, None]), image, size)
        return F.conv2d(self.function(source, image, size), weight[:, :, None, None])


def candidate(spec: str) -> Candidate:
    """Finds an upsampler by its name, file or plug-in, see the module's description."""
    name, _, rest = spec.rpartition("=")
    file, _, option = rest.partition("@")
    function: Callable[..., Tensor]
    head: Head = "before"
    is_stack = False
    if rest in BASELINES:
        function, default, part = getattr(baselines, rest), rest, rest
        source = Path(baselines.__file__)
    elif (file in UPSAMPLERS or Path(file).is_file()) and option in ("", "unit"):
        source = resolve(file)
        function, is_stack = _stack(source, unit_sum=option == "unit"), True
        stem = file if file in UPSAMPLERS else source.stem
        default = stem + (f"@{option}" if option else "")
        part = " ".join([option, *map(digest, STACK_CODE)])
    elif is_plug_in(rest):
        own, source = plug_in(rest, "source", "image", "size")
        function = partial(_call, own, rest)
        default = part = rest.partition(":")[2]
        head = getattr(own, "head", "after")
    else:
        raise UnknownUpsamplerError(
            f"an upsampler is one of {', '.join((*BASELINES, *UPSAMPLERS))}, a weights file "
            f"(FILE or FILE@unit) or a plug-in module:callable; got {spec!r}"
        )
    return Candidate(
        name=name or default,
        function=function,
        head=head,
        identity=f"{digest(source)} {part}" if source.is_file() else None,
        takes_looks=is_stack,
    )


def is_plug_in(spec: str) -> bool:
    """Returns whether this is ``module:callable``, and not such as ``hf-hub:owner/name``."""
    module, colon, attribute = spec.partition(":")
    return bool(colon) and all(each.isidentifier() for each in (*module.split("."), attribute))


def plug_in(spec: str, *arguments: str) -> tuple[Any, Path]:
    """Imports ``module:callable``, which takes these arguments, and ``head=`` if that is inside.

    Returns it and its module's file, which need not exist. Raises UnknownUpsamplerError if it
    cannot be imported, or takes others.
    """
    module, _, attribute = spec.partition(":")
    try:
        own = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UnknownUpsamplerError(
            f"a plug-in module:callable must be importable; got {spec!r} "
            f"({type(error).__name__}: {error}); check its name, add its folder to PYTHONPATH, or "
            "mend the module"
        ) from error
    options = ["head"] if getattr(own, "head", None) == "inside" else []
    try:
        inspect.signature(own).bind(*arguments, **dict.fromkeys(options))
    except ValueError:
        pass  # a function in C may have no signature
    except TypeError as error:
        call = ", ".join((*arguments, *(f"{name}=..." for name in options)))
        raise UnknownUpsamplerError(
            f"a plug-in must be callable as {attribute}({call}); got {spec!r} ({error}); change "
            "its parameters"
        ) from error
    return own, Path(getattr(sys.modules[module], "__file__", None) or "")


@contextmanager
def own_code(spec: str) -> Iterator[None]:
    """Raises exceptions of a plug-in's own code as PlugInError."""
    try:
        yield
    except Exception as error:
        raise PlugInError(f"the plug-in {spec!r} raised {type(error).__name__}") from error


def _call(
    own: Callable[..., Tensor],
    spec: str,
    source: Tensor,
    image: Tensor,
    size: tuple[int, int],
    **options: Tensor,
) -> Tensor:
    """Calls a plug-in and checks what it returns."""
    with own_code(spec):
        output = own(source, image, size, **options)
    channels = len(options["head"]) if options else source.shape[1]
    needed, is_tensor = (len(source), channels, *size), isinstance(output, Tensor)
    if not is_tensor or tuple(output.shape) != needed:
        got = tuple(output.shape) if is_tensor else type(output).__name__
        raise ValueError(
            f"a plug-in must return a tensor of shape {needed}; {spec!r} gave {got}; upsample its "
            "source to the size it is given, with the same channels"
        )
    return output


def _stack(path: Path, *, unit_sum: bool) -> Callable[..., Tensor]:
    """Reads stages without their closing convolution, which belongs to one backbone."""
    tensors = convert_upstream(path).upsampler if path.suffix == ".ckpt" else read(path)
    tensors = {key: value for key, value in tensors.items() if key.startswith(("up", "first."))}
    stack = JBUStack.fitting(tensors).eval().requires_grad_(False)
    load_into(stack, tensors, origin=path)

    def unit(kernels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(kernel / kernel.sum(1, keepdim=True).clamp(min=MIN_SUM) for kernel in kernels)

    def upsample(
        source: Tensor, image: Tensor, size: tuple[int, int], looks_per_side: int = 1
    ) -> Tensor:
        stack.looks_per_side = looks_per_side
        if not unit_sum:
            return stack(source, image, size=size)
        kernels = stack.kernels(image, (source.shape[-2], source.shape[-1]), size=size)
        first = kernels.first and kernels.first._replace(learned=unit(kernels.first.learned))
        return stack.upsample(source, replace(kernels, stages=unit(kernels.stages), first=first))

    return upsample
