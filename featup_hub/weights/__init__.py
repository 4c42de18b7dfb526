"""Sources of weights: a file of the user, the folder of shipped files, the Hub.

Shipped files are safetensors. Their digest is in the registry and checked on every load.
timm loads its own weights, see :mod:`featup_hub.backbones`.
"""

from typing import TYPE_CHECKING

from featup_hub import _lazy
from featup_hub.files import sha256_of_file as digest

if TYPE_CHECKING:
    from featup_hub.weights.checkpoints import read_state
    from featup_hub.weights.files import (
        load,
        load_into,
        metadata,
        read,
        resolve,
        shipped_folder,
        split_norm,
        write,
    )
    from featup_hub.weights.hub import download, explained
    from featup_hub.weights.upstream import ConvertedCheckpoint, convert, convert_upstream

__all__ = [
    "ConvertedCheckpoint",
    "convert",
    "convert_upstream",
    "digest",
    "download",
    "explained",
    "load",
    "load_into",
    "metadata",
    "read",
    "read_state",
    "resolve",
    "shipped_folder",
    "split_norm",
    "write",
]

__getattr__, __dir__ = _lazy(globals(), ("files", "checkpoints", "hub", "upstream"))
