"""Writes docs/api.md from signatures and docstrings: python docs/make_api.py.

A test compares the file with what this makes, so change docstrings, not the file.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
# Modules and the public names of each that people call; None: all.
MODULES: dict[str, tuple[str, ...] | None] = {
    "featup_hub": None,
    "featup_hub.upsamplers": (
        "JBUKernels",
        "FoldedHead",
        "JointBilateralStage",
        "JointKernels",
        "stage_sizes",
    ),
    "featup_hub.upsamplers.tiled": ("upsample_tiled",),
    "featup_hub.upsamplers.baselines": None,
    "featup_hub.ops": ("jbu_kernel", "jbu_apply"),
    "featup_hub.image": ("read_image", "resize", "preprocess"),
    "featup_hub.visualize": None,
    "featup_hub.export": None,
    "featup_hub.weights": ("convert", "convert_upstream", "read", "write", "metadata", "digest"),
    "featup_hub.training.implicit": ("ImplicitConfig",),
    "featup_hub.training.implicit_batch": ("fit_batch",),
    "featup_hub.training.jbu": ("train", "JBUTrainingConfig"),
    "featup_hub.evaluation.layouts": ("open_data",),
    "featup_hub.evaluation.protocol": ("evaluate",),
    "featup_hub.evaluation.config": ("EvaluationConfig",),
}
ITEM = re.compile(r"    (\*{0,2}\w+): (.*)")
LISTS = ("Args", "Attributes", "Raises")
EXAMPLES = ("Example", "Examples")
SECTION = re.compile(rf"({'|'.join((*LISTS, *EXAMPLES, 'Returns', 'Yields'))}):$")


def page() -> str:
    """Returns the whole reference as Markdown."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python docs/make_api.py`. Shapes: B batch, C channels, "
        "h×w low and H×W high resolution.",
    ]
    for module_name, names in MODULES.items():
        module = importlib.import_module(module_name)
        lines += ["", f"## {module_name}", "", _inline((module.__doc__ or "").split("\n\n")[0])]
        for name in names or module.__all__:
            if not name.startswith("__"):
                lines += _entry(name, getattr(module, name))
    return "\n".join(lines) + "\n"


def _entry(name: str, thing: Any) -> list[str]:
    """Describes a function, or a class with its public methods."""
    lines = ["", f"### {name}", "", *_signature(name, thing), "", *_prose(thing)]
    if not inspect.isclass(thing):
        return lines
    for method, value in vars(thing).items():
        function = inspect.unwrap(getattr(value, "__func__", value))
        documented = inspect.isfunction(function) and function.__doc__
        if documented and not method.startswith("_") and function.__module__ == thing.__module__:
            lines += ["", f"#### {name}.{method}", "", *_signature(method, function), ""]
            lines += _prose(function)
    return lines


def _signature(name: str, thing: Any) -> list[str]:
    signature = inspect.signature(thing)
    parameters = [
        p.replace(
            # What is not a plain value has an address or a long text for its repr.
            default=p.default if _plain(p.default) else _Shown("..."),
            annotation=_unquoted(p.annotation),
        )
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    empty = inspect.Signature.empty
    result = empty if inspect.isclass(thing) else _unquoted(signature.return_annotation)
    text = str(signature.replace(parameters=parameters, return_annotation=result))
    if len(name) + len(text) > 92:
        inside, after = text[1:].rsplit(")", 1) if " -> " not in text else text[1:].split(") -> ")
        parts = re.split(r", (?![^\[(]*[\])])", inside)
        after = f" -> {after}" if " -> " in text else after
        text = "(\n" + "".join(f"    {part},\n" for part in parts) + f"){after}"
    return ["```text", f"{name}{text}", "```"]


def _unquoted(annotation: Any) -> Any:
    return _Shown(annotation) if isinstance(annotation, str) else annotation


class _Shown(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _plain(value: Any) -> bool:
    kinds = (int, float, str, tuple, type(None))
    return value is inspect.Parameter.empty or isinstance(value, kinds)


def _prose(thing: Any) -> list[str]:
    """Turns a Google docstring into Markdown."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    return [line.rstrip() for line in _paragraphs(lines)]


def _paragraphs(lines: list[str]) -> Iterator[str]:
    section, fence = "", ""
    for number, line in enumerate(lines):
        if found := SECTION.match(line):
            section = found[1]
            if section not in EXAMPLES:
                yield f"**{section}**"
                yield ""
            continue
        if fence and line and not line.startswith("    "):
            yield "```"
            yield ""
            section = fence = ""
        if line.startswith(".. math::"):
            yield f"```math\n{line.removeprefix('.. math::').strip()}"
            fence = "math"
        elif section in EXAMPLES and not fence and line.startswith("    >>>"):
            yield f"```pycon\n{line[4:]}"
            fence = "pycon"
        elif fence == "pycon" and line.endswith("::"):
            yield f"```\n\n{_inline(line[4:-1])}\n\n```text"
            fence = "text"
        elif fence:
            if line or any(lines[number + 1 :]):
                yield line[8 if fence == "text" else 4 :]
        elif section in LISTS and (item := ITEM.match(line)):
            yield f"- `{item[1].lstrip('*')}`: {_inline(item[2])}"
        elif section in LISTS and line.startswith("        "):
            yield f"  {_inline(line.strip())}"
        else:
            yield _inline(line.strip() if section else line)
    if fence:
        yield "```"


def _inline(text: str) -> str:
    """Turns reStructuredText's marks into Markdown's."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
