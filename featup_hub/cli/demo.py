"""``featup-hub demo``: a page in the browser that shows similarity of features."""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.terminal import UsageError, explain

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="click a point, see which pixels are similar",
        description=(
            "Opens a page in the browser. Click a point of a photograph: places with similar "
            "features become bright, patch by patch and pixel by pixel, there and in a second "
            "photograph. It needs gradio: pip install 'featup_hub[demo]'."
        ),
    )
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE", help="at most two photographs")
    add(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME[=FILE]",
        help="the backbone, and a file with its weights if they are your own "
        "(default: %(default)s)",
    )
    add("--upsampler", default="jbu_denoise", help="its name (default: %(default)s)")
    add("--size", type=int, default=448, help="short side in pixels (default: %(default)s)")
    add("--port", type=int, help="of the page's address (default: the first free one from 7860)")
    add("--no-browser", action="store_true", help="print the address, open no browser")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from featup_hub.demo import build
    from featup_hub.image import read_image
    from featup_hub.loading import list_models

    _check_model(args.model)
    page = build(
        [read_image(path) for path in args.images],
        model=args.model,
        upsampler=args.upsampler,
        models=list_models(),
        size=args.size,
    )
    page.launch(inbrowser=not args.no_browser, server_port=args.port)
    return 0


def _check_model(spec: str) -> None:
    """Refuses a model that does not exist, which the page would tell only once it is open."""
    from featup_hub.loading import find_card, name_and_file
    from featup_hub.weights.files import existing

    try:
        name, file = name_and_file(spec)
        if find_card(name).backbone is None:
            raise ValueError(f"a model with a backbone is needed; got {name}; name another")
        if file is not None:
            existing(file)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(explain(error)) from error
