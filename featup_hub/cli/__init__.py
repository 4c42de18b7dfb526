"""The command line: ``featup-hub COMMAND``, one module per command.

A command is a module: its docstring is the help, ``add_arguments(parser)`` adds the flags, and
``run(args)`` does the work. Parsing does not import torch, so that help and errors in flags appear
at once. Exit codes: 0 success, 1 failure, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

from featup_hub import __version__
from featup_hub.cli.arguments import UsageError, complain, explain

__all__ = ["main"]

_COMMANDS = ("models", "upsample", "demo", "fit", "train", "convert", "export", "evaluate", "env")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    A user's mistake gives one line on stderr; with ``--debug`` it is raised.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, TextIOWrapper):  # names of files need not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, _interrupt)
    try:
        parser = _parser()
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain(str(message), "warning")
            return int(args.run(args))
    except KeyboardInterrupt:
        complain("interrupted; what is finished is kept")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # Other exceptions are bugs; a bug report needs their traceback.
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        if "--debug" in argv:
            raise
        complain(explain(error))
        return 2 if isinstance(error, UsageError) else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C; during torch's import its C++ code would abort on a KeyboardInterrupt."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        complain("interrupted")
        os._exit(130)
    signal.default_int_handler(number, frame)


class _Parser(argparse.ArgumentParser):
    """Raises errors in flags, which name the command and its help."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # a command would leave them to the parser of all commands
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    # Flags are not abbreviated, so that a new flag does not break scripts.
    parser = _Parser(
        allow_abbrev=False,
        prog="featup-hub",
        description="High-resolution features from any vision backbone.",
        epilog="featup-hub COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"featup_hub {__version__}")
    with suppress(ImportError):  # an extra
        import shtab

        shtab.add_argument_to(parser, help="print a script that completes commands in a shell")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        module = import_module(f"{__name__}.{name}")
        text = module.__doc__ or ""
        command = commands.add_parser(
            name, help=text.split(".")[0], description=text, allow_abbrev=False
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        command.set_defaults(run=module.run)
    return parser
