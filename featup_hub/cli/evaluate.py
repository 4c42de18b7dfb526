"""``featup-hub evaluate``: upsamplers side by side on labelled data."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from featup_hub.cli.flags import add_flags, from_flags, in_terms_of_flags
from featup_hub.cli.outputs import make_folder
from featup_hub.cli.terminal import UsageError
from featup_hub.evaluation.candidates import Candidate, UnknownUpsamplerError, candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.figure import draw
from featup_hub.evaluation.protocol import check, evaluate
from featup_hub.evaluation.report import Row, table, write_csv, write_json

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="score upsamplers side by side on labelled data",
        description="Scores upsamplers side by side on the same images and features, with 95 % "
        "intervals over images and paired differences.",
        epilog="Example: featup-hub evaluate --data camvid:DATA/camvid nyu:DATA/nyu "
        "--upsamplers bilinear bicubic mine.safetensors --protocols oracle --val-images 12",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for results.json, results.csv and results.png"
    )
    add_flags(parser, EvaluationConfig)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    with in_terms_of_flags():
        config = from_flags(EvaluationConfig, args)
    candidates = [_open(spec) for spec in config.upsamplers]
    with in_terms_of_flags():
        check(config, candidates)
    if args.out:
        make_folder(args.out)
    start = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - start:.0f} s] {line}", file=sys.stderr, flush=True)

    scored: list[Row] = []
    for rows in evaluate(config, progress=progress):
        print(table(rows), end="\n\n", flush=True)
        scored += rows
        if args.out:  # after every table, so that a run that is stopped leaves what it found
            write_json(scored, config, args.out / "results.json")
            write_csv(scored, args.out / "results.csv")
    if args.out:
        if any(row.versus for row in scored):
            draw(scored, args.out / "results.png")
        print(f"wrote results to {args.out}")
    return 0


def _open(spec: str) -> Candidate:
    """Finds an upsampler; what cannot be one is refused in terms of what was typed."""
    try:
        return candidate(spec)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--upsamplers needs a plug-in module:callable that can be imported; got {spec!r} "
            f"({error}); check its name, and that PYTHONPATH has its folder"
        ) from error
    except (TypeError, UnknownUpsamplerError) as error:
        raise UsageError(f"--upsamplers: {error}") from error
