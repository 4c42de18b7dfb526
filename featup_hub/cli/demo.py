"""Show in the browser which pixels are similar to a point.

Click a point of a photograph: places with similar features become bright, patch by patch and pixel
by pixel, there and in a second photograph. It needs gradio: pip install 'featup_hub[demo]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.cli.arguments import UsageError, choose_backbone
from featup_hub.cli.flags import add_backbone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone(parser)
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE", help="at most two photographs")
    add("--upsampler", default="jbu_denoise", help="its name (default: %(default)s)")
    add("--size", type=int, default=448, help="short side in pixels (default: %(default)s)")
    add("--port", type=int, help="of the page's address (default: the first free one from 7860)")
    add("--no-browser", action="store_true", help="print the address, open no browser")


def run(args: argparse.Namespace) -> int:
    from featup_hub.demo import build
    from featup_hub.pixels import read_image

    # Checked now, not when the page opens.
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UsageError(f"--port must be from 1 to 65535; got {args.port}")
    choose_backbone(args.model, args.upsampler)
    page = build(
        [read_image(path) for path in args.images],
        model=args.model,
        upsampler=args.upsampler,
        size=args.size,
    )
    try:
        page.launch(inbrowser=not args.no_browser, server_port=args.port)
    except OSError as error:
        if error.errno is not None:  # the system's; gradio's own, about ports, have no number
            raise
        tried = f"{args.port} is" if args.port else "those from 7860 are"
        raise OSError(
            f"a free port is needed; {tried} in use, or not allowed; give another --port"
        ) from error
    return 0
