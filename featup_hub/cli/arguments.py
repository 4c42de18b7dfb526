"""Arguments of several commands: model, size, device. Its import does not import torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featup_hub.cli.terminal import UsageError, explain

if TYPE_CHECKING:
    import torch

    from featup_hub.model import UpsampledBackbone

__all__ = ["ChosenModel", "add_model", "choose_model", "open_device", "parse_size"]


@dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """The model that the flags name; its files exist.

    Attributes:
        name: The backbone's name.
        backbone_weights: A file for the backbone; None for its own.
        upsampler: The file of the upsampler.
        use_norm: Whether features are normalised before upsampling.
        layer: Block of the backbone that gives the features; None for the card's.
        looks: Passes of the backbone over shifted images.
        image_size: Short side given by the model's card, in pixels.
        stride: Stride of the source in pixels; None if unknown before loading.
    """

    name: str
    backbone_weights: Path | None
    upsampler: Path
    use_norm: bool
    layer: int | None
    looks: int
    image_size: int
    stride: int | None

    def load(self, device: torch.device | None = None) -> UpsampledBackbone:
        """Loads the model."""
        from featup_hub.loading import load

        return load(
            self.name,
            use_norm=self.use_norm,
            upsampler=self.upsampler,
            backbone_weights=self.backbone_weights,
            layer=self.layer,
            looks=self.looks,
            device=device,
        )

    def settings(self) -> dict[str, str]:
        """Returns the settings that identify the model in the metadata of its outputs."""
        from featup_hub.files import sha256_of_file

        own = self.backbone_weights
        return {
            "model": self.name,
            "normalised": "yes" if self.use_norm else "no",
            "upsampler": sha256_of_file(self.upsampler)[:16],
            "backbone": sha256_of_file(own)[:16] if own else "its own",
            "layer": "default" if self.layer is None else str(self.layer),
            "looks": str(self.looks),
        }


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a model, and old spellings of them."""
    add = parser.add_argument
    add(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME[=FILE]",
        help="the backbone, and a file with its weights if they are your own "
        "(default: %(default)s)",
    )
    add("--backbone-weights", metavar="FILE", help=argparse.SUPPRESS)
    add("--upsampler", metavar="NAME|FILE", help="jbu_denoise (default), jbu_faithful, or a file")
    add("--weights", dest="upsampler", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--no-norm", action="store_true", help="do not normalise features before upsampling")
    add("--layer", type=int, metavar="N", help="take the features of this block of the backbone")
    add(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="let the backbone look at N shifted images, 4 or 9, for finer features at N times "
        "the cost (default: %(default)s)",
    )


def choose_model(args: argparse.Namespace) -> ChosenModel:
    """Finds the model and the files that the flags of :func:`add_model` name.

    Raises:
        UsageError: If there is no such model or file.
    """
    from featup_hub.loading import find_card, name_and_file
    from featup_hub.weights import resolve
    from featup_hub.weights.files import existing

    try:
        name, file = name_and_file(args.model)
        file = file or args.backbone_weights
        card = find_card(name)
        if card.backbone is None:
            raise ValueError(
                f"a model with a backbone is needed; {name} upsamples features of your own, in "
                "Python"
            )
        return ChosenModel(
            name=card.name,
            backbone_weights=existing(file) if file else None,
            upsampler=resolve(card.upsampler_file, path=args.upsampler),
            use_norm=not args.no_norm,
            layer=args.layer,
            looks=args.looks,
            image_size=card.image_size,
            stride=card.patch_size if args.layer is None and args.looks == 1 else None,
        )
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(explain(error)) from error


def parse_size(text: str, flag: str = "--size") -> int | tuple[int, int]:
    """Reads a size: 448 is the short side, 448x640 is height and width.

    Raises:
        UsageError: If the text has another form.

    Example:
        >>> parse_size("448"), parse_size("448x640")
        (448, (448, 640))
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise UsageError(f"{flag} must be a number, such as 448, or HxW, 448x640; got {text!r}")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def open_device(name: str | None) -> torch.device:
    """Returns a device after testing it.

    Args:
        name: Its name in PyTorch; default: cuda if there is one, else cpu.

    Raises:
        UsageError: If the device does not exist or cannot be used.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu, cuda, cuda:1 or mps; got {name!r}") from error
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest is a list of backends
        raise UsageError(f"--device {device} cannot be used here: {reason}") from error
