"""A stream of photographs in random order and crops, the same one whenever it is asked.

Everything about sample n follows from the seed and n, so nothing has to be stored to resume.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featup_hub.image import IMAGE_SUFFIXES, list_images, read_image
from featup_hub.training.digests import digest_of_files

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PhotoStream", "seeded"]


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
        self.paths = list_images(folder)
        if not self.paths:
            raise ValueError(
                f"training needs photographs ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                f"{folder} and its subfolders hold none"
            )
        self.folder = folder
        self.seed = seed
        self.min_scale = min_scale
        self._unreadable: set[Path] = set()

    @property
    def digest(self) -> str:
        """Tells this set of photographs from others, by their names and sizes in bytes."""
        return digest_of_files(self.paths, self.folder)

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
        """Returns sample ``number`` of the stream, (3, *size), RGB in [0, 1].

        A photograph that cannot be read is warned of once; the epoch's next one takes its place.

        Raises:
            ValueError: If no photograph can be read.
        """
        import numpy as np
        from PIL.Image import Resampling

        photo = self._read(number)
        draws = torch.rand(4, generator=seeded(self.seed, 1, number), dtype=torch.float64).tolist()
        box = _random_box(photo.size, size, self.min_scale, draws)
        height, width = size
        crop = photo.resize((width, height), Resampling.BICUBIC, box=box, reducing_gap=2.0)
        pixels = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).float() / 255
        return pixels.flip(2) if draws[3] < 0.5 else pixels

    def _read(self, number: int) -> Image.Image:
        """Reads the photograph of a sample, or the first after it that can be read."""
        count = len(self.paths)
        epoch, position = divmod(number, count)
        order = torch.randperm(count, generator=seeded(self.seed, 0, epoch))
        for index in order.roll(-position).tolist():
            path = self.paths[index]
            try:
                return read_image(path)
            except (OSError, ValueError) as error:
                reason = error
            if path not in self._unreadable:
                self._unreadable.add(path)
                warnings.warn(f"{reason}; training goes on without it", stacklevel=2)
        raise ValueError(
            f"training needs photographs that can be read; {self.folder} holds {count}, and none "
            f"can ({reason}); check the files"
        )


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
