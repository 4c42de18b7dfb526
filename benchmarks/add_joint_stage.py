"""Puts a joint bilateral stage, at its defaults, before the stages of a weights file.

For ``weights/jbu_smooth.safetensors``::

    python -m benchmarks.add_joint_stage STAGES.safetensors weights/jbu_smooth.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.upsamplers import JointBilateralStage
from featup_hub.weights import metadata, read, write


def main() -> None:
    """Reads, adds six numbers, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    first = JointBilateralStage().state_dict()
    tensors = read(chosen.stages) | {f"first.{key}": value for key, value in first.items()}
    notes = metadata(chosen.stages) | {"architecture": "JBUStack(feat_dim=None, joint_first=True)"}
    write(tensors, chosen.out, metadata=notes)


if __name__ == "__main__":
    main()
