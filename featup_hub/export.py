"""Exports models that run without this package: PyTorch programs (.pt2) and ONNX graphs.

Exported files have only standard operators: PyTorch programs those of the definition,
:mod:`featup_hub.ops.reference`, ONNX graphs those that :mod:`featup_hub.ops.onnx` writes. The
number of stages in a graph is fixed by the example. The graph takes any batch size, and all sizes
with a ratio of output to source that needs the same number of stages, ceil(log2 ratio). With a
backbone of stride p, or looks of that stride, these are all images with sides that are multiples of
p, if the example's are. An example of ratio 1 on one axis serves only inputs of ratio 1 on that
axis. A PyTorch program checks this; an ONNX graph cannot. A backbone with a fixed size is exported
for one size of image.

Symbolic sizes are slow to trace: in a PyTorch program the taps of a filter are a loop, and an ONNX
graph is traced with this package's operators whole.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from featup_hub.files import write_atomically
from featup_hub.ops.jbu import keep_whole

__all__ = ["check_onnx", "trace", "write_onnx", "write_pt2"]


def trace(
    model: nn.Module, *inputs: Tensor, dynamic: bool = True, for_onnx: bool = False
) -> ExportedProgram:
    """Traces a model for export.

    Args:
        model: An ``UpsampledBackbone``, ``JBUStack`` or ``FoldedHead``, in evaluation mode.
        *inputs: An example of its inputs: an image, or a source and its guidance. Only the sizes
            matter: they fix the number of stages.
        dynamic: Whether batch, heights and widths may differ from the example's.
        for_onnx: Keep this package's operators whole, for :func:`write_onnx` only. With dynamic
            sizes it takes a quarter of the time.

    Returns:
        The program; ``program.module()(*inputs)`` runs it.

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
        if fixed := [x.fixed_size for x in model.modules() if getattr(x, "fixed_size", None)]:
            raise ValueError(
                "dynamic sizes need a backbone whose source grows with the image; this one sees "
                f"every image at {fixed[0]}; give dynamic=False (--static HxW on the command line)"
            )
        if any(1 in x.shape[2:] for x in inputs):
            raise ValueError(
                "sides to be dynamic must be at least 2 in the example, 1 is taken as a constant; "
                f"got {', '.join(str(tuple(x.shape)) for x in inputs)}; give a larger example"
            )
        inputs = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)  # 1, likewise
        axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
        shapes = tuple(axes for _ in inputs)
    with torch.no_grad(), _short_padding(), keep_whole() if for_onnx else nullcontext():
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def write_pt2(program: ExportedProgram, path: str | Path) -> None:
    """Writes a result of :func:`trace` as ``*.pt2`` for ``torch.export.load``."""
    if any(str(node.target).startswith("featup_hub.") for node in program.graph.nodes):
        raise ValueError(
            "a program of standard operators is needed; got one traced with for_onnx=True; "
            "trace again without it"
        )
    whole = BytesIO()  # PyTorch's own writer ends the process if a write fails
    torch.export.save(program, whole)
    with write_atomically(path) as partial, partial.open("wb") as file:
        file.write(whole.getbuffer())


def check_onnx() -> None:
    """Raises ImportError if ONNX's packages are missing, before the slow tracing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"an ONNX graph needs {' and '.join(missing)}; pip install 'featup_hub[onnx]'"
        )


def write_onnx(program: ExportedProgram, path: str | Path) -> None:
    """Writes a result of :func:`trace` as an ONNX graph with an output named ``features``.

    It takes any program; those traced with ``for_onnx`` are the fastest to make.
    Weights of more than 1.5 GiB go to a second file, ``*.onnx.data``. Keep both in one folder.
    """
    check_onnx()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist; make it first")
    from featup_hub.ops.onnx import TRANSLATIONS

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own code
        graph = torch.onnx.export(
            program,
            dynamo=True,
            output_names=["features"],
            verbose=False,
            external_data=False,
            custom_translation_table=TRANSLATIONS,
            # The exporter's optimisation of long graphs is slow, and runtimes optimise them anyway.
            optimize=False,
        )
    # Under its final name, because the graph contains the name of the second file.
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        graph.save(Path(folder, path.name))  # type: ignore[union-attr]  # None if not dynamo
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)


@contextmanager
def _short_padding() -> Iterator[None]:
    """Keeps symbolic sizes short after convolutions with TensorFlow's padding in timm.

    The padding depends on the input's size. Four such layers give a nested formula that takes sympy
    minutes. If the side is a multiple of the stride, the padding is a constant; a guard
    distinguishes the two cases.
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
