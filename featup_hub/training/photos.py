"""Training photographs: shuffled, cropped at random, reproducible.

Sample n depends only on the seed and n, so a resumed run needs no stored state.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featup_hub.image import IMAGE_SUFFIXES, list_images, read_image
from featup_hub.training.seeds import seeded

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PhotoStream"]


class PhotoStream:
    """An endless stream of random crops of the photographs in a folder and its subfolders.

    Args:
        folder: Folder of photographs.
        seed: Seed of order and crops.
        min_scale: Smallest share of a photograph's area in a crop.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the folder has no photograph.
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
                f"{folder} and its subfolders have none"
            )
        self.folder = folder
        self.seed = seed
        self.min_scale = min_scale
        self._unreadable: set[Path] = set()

    @property
    def digest(self) -> str:
        """The sha256 of the files' names and sizes; contents are not read, to save time."""
        total = hashlib.sha256()
        for path in self.paths:
            name = path.relative_to(self.folder).as_posix()
            total.update(f"{name!r} {path.stat().st_size};".encode())
        return total.hexdigest()

    def batch(self, step: int, count: int, size: tuple[int, int]) -> Tensor:
        """Returns the photographs of a step.

        Args:
            step: Number of the step. Within an epoch, no two steps share a photograph.
            count: Photographs per step.
            size: Height and width wanted.

        Returns:
            RGB in [0, 1], (count, 3, *size).
        """
        first = step * count
        return torch.stack([self.sample(first + i, size) for i in range(count)])

    def sample(self, number: int, size: tuple[int, int]) -> Tensor:
        """Returns sample ``number`` of the stream, (3, *size), RGB in [0, 1].

        If a photograph cannot be read, a warning names it once, and the next one replaces it.

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
        """Reads the photograph of a sample; skips unreadable ones."""
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
                warnings.warn(f"{reason}; training continues without it", stacklevel=2)
        raise ValueError(
            f"training needs photographs that can be read; {self.folder} holds {count}, and none "
            f"can ({reason}); check the files"
        )


def _random_box(
    photo: tuple[int, int], size: tuple[int, int], min_scale: float, draws: list[float]
) -> tuple[float, float, float, float]:
    """Returns the crop (left, top, right, bottom) given by the random numbers ``draws``."""
    width, height = photo
    fit = min(width / size[1], height / size[0])
    factor = fit * math.sqrt(min_scale + (1 - min_scale) * draws[0])
    box_width, box_height = size[1] * factor, size[0] * factor
    left, top = draws[1] * (width - box_width), draws[2] * (height - box_height)
    return left, top, min(left + box_width, width), min(top + box_height, height)
