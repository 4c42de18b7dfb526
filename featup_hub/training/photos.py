"""Training photographs: shuffled, cropped at random, reproducible.

Sample n depends only on the seed and n, so a resumed run needs no stored state.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featup_hub.image import IMAGE_SUFFIXES, list_images, to_tensor
from featup_hub.pixels import read_image
from featup_hub.training.seeds import seeded


class PhotoStream:
    """An endless stream of random crops of the photographs in a folder and its subfolders.

    ``seed`` is that of order and crops; ``min_scale`` is the smallest area of a crop, as a share of
    the largest crop that fits into the photograph.
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
        self.folder, self.seed, self.min_scale = folder, seed, min_scale
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
        """Returns the photographs of a step, (count, 3, *size), RGB in [0, 1].

        Within an epoch, no two steps share a photograph.
        """
        return torch.stack([self.sample(step * count + i, size) for i in range(count)])

    def sample(self, number: int, size: tuple[int, int]) -> Tensor:
        """Returns sample ``number`` of the stream, (3, *size), RGB in [0, 1].

        If a photograph cannot be read, a warning names it once, and the next one replaces it.
        """
        photo, (height, width) = self._read(number), size
        share, x, y, mirror = torch.rand(
            4, generator=seeded(self.seed, 1, number), dtype=torch.float64
        ).tolist()
        fit = min(photo.width / width, photo.height / height)
        factor = fit * math.sqrt(self.min_scale + (1 - self.min_scale) * share)
        left, top = x * (photo.width - width * factor), y * (photo.height - height * factor)
        right, bottom = left + width * factor, top + height * factor
        box = (left, top, min(right, photo.width), min(bottom, photo.height))
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        pixels = to_tensor(crop)
        return pixels.flip(2) if mirror < 0.5 else pixels

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
