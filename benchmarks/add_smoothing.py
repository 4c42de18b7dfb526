"""Puts the smoothing of cells, at its defaults, before the stages of a weights file.

    python -m benchmarks.add_smoothing STAGES.safetensors weights/jbu_smooth.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.upsamplers import CellSmoothing
from featup_hub.weights import metadata, read, write


def main() -> None:
    """Reads, adds three numbers, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    smoothing = CellSmoothing().state_dict()
    tensors = read(chosen.stages) | {f"smoothing.{key}": value for key, value in smoothing.items()}
    notes = metadata(chosen.stages) | {"architecture": "JBUStack(feat_dim=None, smooth=True)"}
    write(tensors, chosen.out, metadata=notes)


if __name__ == "__main__":
    main()
