"""Flags of several commands, and flags made from the fields of a configuration."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from featup_hub.cli.arguments import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names a backbone."""
    parser.add_argument(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME[=FILE]",
        help="the backbone, and a file with its weights if they are your own "
        "(default: %(default)s)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a model."""
    add_backbone(parser)
    add = parser.add_argument
    add(
        "--upsampler",
        default="jbu_denoise",
        metavar="NAME|FILE",
        help="%(default)s (default), jbu_faithful, a file, or a folder of save_pretrained",
    )
    add("--no-norm", action="store_true", help="do not normalise features before upsampling")
    add("--layer", type=int, metavar="N", help="take the features of this block of the backbone")
    add(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="run the backbone on N shifted copies of the image, every second one mirrored, and "
        "combine the maps, at N times the cost; 4, or the square of another divisor of its stride "
        "(default: %(default)s)",
    )


def parse_size(text: str) -> int | tuple[int, int]:
    """Reads a size: 448 is the short side, 448x640 is height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(
            f"a size is a number, such as 448, or HxW, 448x640; got {text!r}"
        )
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def add_flags(
    parser: argparse.ArgumentParser,
    config: type[DataclassInstance],
    *,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Adds a flag ``--name`` for every field of a dataclass; every field has a default.

    Fields may be int, float, str, bool (which makes ``--name`` and ``--no-name``), Path, Literal,
    tuples of any length of these, and any of these or None. The help is the field's entry in the
    docstring's ``Attributes:``. ``flags`` has other names of flags by field, such as
    ``{"backbones": "--model"}``.
    """
    hints, helps = get_type_hints(config), _attributes(config)
    group = parser.add_argument_group("options of the run")
    for field in fields(config):
        text = helps.get(field.name, "") + _default_text(field.default, hints[field.name])
        group.add_argument(
            flags.get(field.name, f"--{field.name.replace('_', '-')}"),
            dest=field.name,
            default=argparse.SUPPRESS,  # the dataclass knows its defaults
            help=text.strip().replace("%", "%%"),
            **_options(hints[field.name]),
        )


def from_flags(config: type[T], args: argparse.Namespace, preset: T | None = None) -> T:
    """Makes a configuration from the given flags; other fields are the preset's, or defaults."""
    given = {f.name: getattr(args, f.name) for f in fields(config) if hasattr(args, f.name)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return config(**values) if preset is None else replace(preset, **values)


@contextmanager
def in_terms_of_flags(
    config: type, *, flags: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Turns a ValueError that begins with a field's name into a UsageError that names its flag."""
    try:
        yield
    except ValueError as error:
        first, _, message = str(error).partition(" ")
        field = first.rstrip(":")
        if field not in getattr(config, "__dataclass_fields__", {}):
            raise
        flag = flags.get(field, f"--{field.replace('_', '-')}")
        raise UsageError(f"{flag}{first[len(field) :]} {message}") from error


def _options(hint: Any) -> dict[str, Any]:
    """Returns argparse's options for a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # with None
        return _options(arguments[0])
    if origin is Literal:
        return {"choices": list(arguments), "type": type(arguments[0])}
    if origin is tuple:
        return {**_options(arguments[0]), "nargs": "+", "action": "extend"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _default_text(value: Any, hint: Any) -> str:
    if value in (None, "", ()):
        return ""
    if hint is bool:
        value = "on" if value else "off"
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def _attributes(config: type) -> dict[str, str]:
    """Reads the ``Attributes:`` section of a Google docstring."""
    section = re.search(r"^Attributes:\n((?: .*\n?|\n)*)", inspect.getdoc(config) or "", re.M)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1], re.M)
    unmarked = ((name, re.sub(r"(?::\w+:)?`+~?([^`]*)`+", r"\1", text)) for name, text in entries)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in unmarked}
