#!/usr/bin/env bash
# Trains weights/jbu_universal.safetensors again. One core, 36 and 35 minutes; stopped, it resumes.
#
#   bash benchmarks/train_jbu_universal.sh [FOLDER]
#
# First with constant regions, to find edges; then with smooth fields in them, to learn what to do
# between edges.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=${1:-runs/jbu_universal}

phase() {
    python -m featup_hub train ../shared/data/photos --out "$@" \
        --backbones efficientnet_lite0 efficientnet_lite0_stride32 \
        vit_small_patch14_dinov2=../shared/backbones/dinov2_vits14_saliency_ft.safetensors \
        --batch 2 --views 3 --image-size 192 --max-aspect 1.3 --max-stride 1.25 \
        --region-weight 1 --lr 0.005 --seed 0
}

phase "$out/first" --steps 1100
phase "$out/second" --steps 1400 --region-field 1 --start "$out/first/jbu.safetensors"
