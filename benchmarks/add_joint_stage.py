"""Adds an untrained joint bilateral stage before the stages of a weights file.

For ``weights/jbu_denoise.safetensors``, and for what ``weights/jbu_faithful.safetensors`` is
trained from at last (``train_jbu.sh``)::

    python -m benchmarks.add_joint_stage FIRST.safetensors weights/jbu_denoise.safetensors
    python -m benchmarks.add_joint_stage THIRD.safetensors joint.safetensors \
        --smoothing-spatial 0 --smoothing-range 0.19 --share 0.3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from featup_hub.upsamplers import JointBilateralStage
from featup_hub.weights import metadata, read, write


def main() -> None:
    """Reads, adds the stage, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smoothing-spatial", type=float, default=1.5, help="0: no smoothing")
    parser.add_argument("--smoothing-range", type=float, default=0.18, help="how alike is alike")
    parser.add_argument("--share", type=float, default=0.5, help="beside the learned stage")
    chosen = parser.parse_args()
    first = JointBilateralStage(
        smoothing_spatial=chosen.smoothing_spatial,
        smoothing_range=chosen.smoothing_range,
        share=chosen.share,
    ).state_dict()
    tensors = read(chosen.stages) | {f"first.{key}": value for key, value in first.items()}
    notes = metadata(chosen.stages) | {"architecture": "JBUStack(feat_dim=None, joint_first=True)"}
    write(tensors, chosen.out, metadata=notes)


if __name__ == "__main__":
    main()
