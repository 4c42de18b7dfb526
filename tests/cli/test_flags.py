"""Flags made from the fields of a configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featup_hub.cli.flags import add_flags, from_flags


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        steps: How many
            steps, at 100 %.
        rate: See :func:`steps` and ``this``.
        mode: A choice.
        names: Any number.
        sides: Any number, too.
        fast: Whether.
        out: Where to.
        limit: At most.
    """

    steps: int = 5
    rate: float = 1e-3
    mode: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    sides: tuple[int, ...] = (2, 3)
    fast: bool = True
    out: Path | None = None
    limit: float | None = None


def parser_of_run() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_flags(parser, Run, flags={"names": "--model"})
    return parser


def test_flags_set_fields_of_every_kind():
    line = (
        "--steps 7 --rate .5 --mode b --sides 4 --sides 6 --model x y --no-fast --out o --limit 2"
    )
    run = from_flags(Run, parser_of_run().parse_args(line.split()))
    assert run == Run(
        steps=7,
        rate=0.5,
        mode="b",
        names=("x", "y"),
        sides=(4, 6),
        fast=False,
        out=Path("o"),
        limit=2.0,
    )
    assert from_flags(Run, parser_of_run().parse_args([])) == Run()


def test_flags_take_their_help_from_the_docstring():
    text = " ".join(parser_of_run().format_help().split())
    assert "How many steps, at 100 % (default: 5)" in text
    assert "See steps and this (default: 0.001)" in text
    assert "Any number, too (default: 2 3)" in text
    assert "Whether (default: on)" in text
    assert "At most -" not in text
    assert "None" not in text
