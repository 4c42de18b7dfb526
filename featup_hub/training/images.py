"""A stream of photographs in random order and crops, the same one whenever it is asked.

Everything about sample n follows from the seed and n, so nothing has to be stored to resume.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from featup_hub.image import read_image

__all__ = ["PhotoStream", "seeded"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def seeded(*numbers: int) -> torch.Generator:
    """Returns a CPU generator that depends on all the numbers, each below 2⁶³.

    Example:
        >>> torch.equal(*[torch.rand(3, generator=seeded(1, 2)) for _ in range(2)])
        True
    """
    state = 0
    for number in numbers:
        # splitmix64: neighbouring seeds and steps give unrelated streams.
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


class PhotoStream:
    """Endless shuffled photographs of a folder and its subfolders, in random resized crops.

    Args:
        folder: Where the photographs are.
        seed: Order and crops depend on it.
        min_scale: Smallest share of a photograph's area that a crop shows.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no photograph.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0, min_scale: float = 0.4) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"training needs a folder of photographs; {folder} is not a folder"
            )
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(
                f"training needs photographs ({', '.join(sorted(SUFFIXES))}); "
                f"{folder} and its subfolders hold none"
            )
        self.seed = seed
        self.min_scale = min_scale

    def batch(self, step: int, count: int, size: tuple[int, int]) -> Tensor:
        """Returns the photographs of a step.

        Args:
            step: Number of the step; steps of one ``count`` share no sample within an epoch.
            count: Photographs per step.
            size: Height and width wanted.

        Returns:
            RGB in [0, 1], (count, 3, *size).
        """
        first = step * count
        return torch.stack([self.sample(first + i, size) for i in range(count)])

    def sample(self, number: int, size: tuple[int, int]) -> Tensor:
        """Returns sample ``number`` of the stream, (3, *size), RGB in [0, 1]."""
        import numpy as np
        from PIL.Image import Resampling

        epoch, position = divmod(number, len(self.paths))
        order = torch.randperm(len(self.paths), generator=seeded(self.seed, 0, epoch))
        photo = read_image(self.paths[int(order[position])])
        draws = torch.rand(4, generator=seeded(self.seed, 1, number), dtype=torch.float64).tolist()
        box = _random_box(photo.size, size, self.min_scale, draws)
        height, width = size
        crop = photo.resize((width, height), Resampling.BICUBIC, box=box, reducing_gap=2.0)
        pixels = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).float() / 255
        return pixels.flip(2) if draws[3] < 0.5 else pixels


def _random_box(
    photo: tuple[int, int], size: tuple[int, int], min_scale: float, draws: list[float]
) -> tuple[float, float, float, float]:
    """Places a box of the wanted shape, (left, top, right, bottom), as large as the draws say."""
    width, height = photo
    fit = min(width / size[1], height / size[0])
    factor = fit * math.sqrt(min_scale + (1 - min_scale) * draws[0])
    box_width, box_height = size[1] * factor, size[0] * factor
    left, top = draws[1] * (width - box_width), draws[2] * (height - box_height)
    return left, top, min(left + box_width, width), min(top + box_height, height)
