"""Models as files that run without this package: PyTorch programs (.pt2) and ONNX graphs.

What is exported is the definition, :mod:`featup_hub.ops.reference`, in standard operators only.
The number of stages is part of a graph: it stays that of the example, and with it the inputs that
the graph serves. These are all batches, and all sizes whose ratio of output to source takes as
many stages, ceil(log2 ratio). Behind a backbone of stride p that is every image whose sides are
multiples of p. A PyTorch program checks this; an ONNX graph cannot.

Writing the default model for every size takes about two minutes of a CPU's time as ONNX, because
each tap of each stage is an operation of its own, and half a minute of that is tracing.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from featup_hub.files import write_atomically

__all__ = ["check_onnx", "trace", "write_onnx", "write_pt2"]


def trace(model: nn.Module, *inputs: Tensor, dynamic: bool = True) -> ExportedProgram:
    """Traces a model for export.

    Args:
        model: An ``UpsampledBackbone``, ``JBUStack`` or ``FoldedHead``, in evaluation mode.
        *inputs: An example of what it takes: an image, or a source and its guidance. Any values;
            the sizes decide on the number of stages.
        dynamic: Whether batch, heights and widths may differ from the example's.

    Returns:
        The program; ``program.module()(*inputs)`` runs it.

    Raises:
        ValueError: If the model is in training mode, or a side to be dynamic is 1 in the example.

    Example:
        >>> from featup_hub import JBUStack
        >>> upsampler = JBUStack(num_stages=1, radius=1, key_dim=2).eval()
        >>> program = trace(upsampler, torch.randn(1, 4, 5, 6), torch.randn(1, 3, 10, 12))
        >>> program.module()(torch.randn(2, 4, 3, 7), torch.randn(2, 3, 6, 13)).shape
        torch.Size([2, 4, 6, 13])
    """
    if model.training:
        raise ValueError("a model to export must be in evaluation mode; call model.eval()")
    shapes = None
    if dynamic:
        if any(1 in x.shape[2:] for x in inputs):
            raise ValueError(
                "sides to be dynamic must be at least 2 in the example, 1 is taken as a constant; "
                f"got {', '.join(str(tuple(x.shape)) for x in inputs)}; give a larger example"
            )
        inputs = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)  # 1, likewise
        axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
        shapes = tuple(axes for _ in inputs)
    with torch.no_grad(), _short_padding():
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def write_pt2(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program for ``torch.export.load``, which needs PyTorch alone.

    Args:
        program: What :func:`trace` returned.
        path: A file named ``*.pt2``.
    """
    with write_atomically(path) as partial, partial.open("wb") as file:
        torch.export.save(program, file)


def check_onnx() -> None:
    """Refuses to begin, where tracing would take a minute before ONNX's packages are missed.

    Raises:
        ImportError: If ONNX's packages are missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"an ONNX graph needs {' and '.join(missing)}; pip install 'featup_hub[onnx]'"
        )


def write_onnx(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program as an ONNX graph, its output named ``features``.

    Weights of more than 1.5 GiB go to a second file beside it, ``*.onnx.data``; the two belong
    together and can be moved together.

    Args:
        program: What :func:`trace` returned.
        path: A file named ``*.onnx``.

    Raises:
        ImportError: If ONNX's packages are missing.
    """
    check_onnx()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        graph = torch.onnx.export(
            program,
            dynamo=True,
            output_names=["features"],
            verbose=False,
            external_data=False,
            # Graphs are long, so its rewriting costs time, and runtimes rewrite them anyway.
            optimize=False,
        )
    path = Path(path)
    # Under its final name, which is written into a graph whose weights lie in a second file.
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        graph.save(Path(folder, path.name))  # type: ignore[union-attr]  # None if not dynamo
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)


@contextmanager
def _short_padding() -> Iterator[None]:
    """Keeps symbolic sizes short behind convolutions that timm pads as TensorFlow does.

    The padding follows the input's size, and four such layers nest it into a formula that takes
    sympy minutes. Where the side is a multiple of the stride, as behind an image whose sides are
    multiples of the model's, it is a constant; which of the two holds becomes a guard.
    """
    padding: Any = sys.modules.get("timm.layers.padding")
    if padding is None:
        yield
        return
    original = padding.get_same_padding

    def short(x: int, kernel_size: int, stride: int, dilation: int) -> int:
        if isinstance(x, torch.SymInt) and x % stride == 0:
            return max((kernel_size - 1) * dilation + 1 - stride, 0)
        return original(x, kernel_size, stride, dilation)

    padding.get_same_padding = short
    try:
        yield
    finally:
        padding.get_same_padding = original
