"""What a protocol measures on, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from featup_hub.backbones import Backbone
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.features import CachedFeatures
from featup_hub.evaluation.folders import Folder

__all__ = ["Bench", "Measurement"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one protocol found on one data set, for every upsampler.

    Attributes:
        protocol: Such as ``point oracle``.
        data: Such as ``camvid/val``.
        backbone: What the features came from, and the stride; for the oracle the stride alone.
        block: Neighbouring images that are alike, see :class:`~featup_hub.evaluation.Folder`.
        sums: Upsampler -> name of the sums -> one tensor per image.
    """

    protocol: str
    data: str
    backbone: str
    block: int = 1
    sums: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)

    def add(self, upsampler: str, sums: dict[str, Tensor]) -> None:
        """Adds one image's sums."""
        known = self.sums.setdefault(upsampler, {})
        for name, value in sums.items():
            known.setdefault(name, []).append(value)

    def only(self, upsampler: str) -> Measurement:
        """Returns the part of one upsampler."""
        return replace(self, sums={upsampler: self.sums[upsampler]})


class Bench(NamedTuple):
    """One backbone on one data set.

    Attributes:
        name: The backbone's name.
        backbone: The backbone.
        train: All training images.
        val: The images to score.
        config: What to measure.
    """

    name: str
    backbone: Backbone
    train: Folder
    val: Folder
    config: EvaluationConfig

    def features(self, folder: Folder, *, mirror: bool = False) -> CachedFeatures:
        """Returns the samples of a folder with their features."""
        return CachedFeatures(folder, self.backbone, cache=self.config.cache, mirror=mirror)

    def measurement(self, protocol: str) -> Measurement:
        """Returns an empty measurement."""
        backbone = f"{self.name} /{self.backbone.patch_size}"
        return Measurement(protocol=protocol, data=self.val.name, backbone=backbone)
