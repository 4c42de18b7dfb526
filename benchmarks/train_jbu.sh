#!/usr/bin/env bash
# Trains weights/jbu_denoise.safetensors and jbu_faithful.safetensors again. One core, about 90
# minutes; stopped, it resumes. The shipped files were trained by the code of commit 4c94980 and
# before. Today's trainer keeps the sum of kernels in another way, so its numbers differ.
#
#   bash benchmarks/train_jbu.sh PHOTOS VIT [FOLDER]
#
# PHOTOS is a folder of photographs (854 of ImageNet, for the shipped files), VIT a safetensors file
# of timm's vit_small_patch14_dinov2, FOLDER where the runs go.
#
# Four phases: jbu_denoise takes the stages of the first, jbu_faithful those of the last.
# First with constant regions, to find edges; then with smooth fields in them, to learn what to do
# between edges; then with less of both, on larger crops, half of them at stride 32; last again,
# with a joint bilateral stage beside the first.
set -euo pipefail
export OMP_NUM_THREADS=1
photos=${1:?a folder of photographs is needed, and a file of vit_small_patch14_dinov2}
vit=vit_small_patch14_dinov2=${2:?a file of weights of vit_small_patch14_dinov2 is needed}
out=${3:-runs/jbu}

phase() {
    python -m featup_hub train "$photos" --out "$@" \
        --batch 2 --views 3 --max-aspect 1.3 --max-stride 1.25
}

phase "$out/first" --model efficientnet_lite0 efficientnet_lite0_stride32 "$vit" \
    --steps 1100 --image-size 192 --region-weight 1 --lr 0.005 --seed 0
phase "$out/second" --model efficientnet_lite0 efficientnet_lite0_stride32 "$vit" \
    --steps 1400 --image-size 192 --region-weight 1 --region-field 1 --lr 0.005 --seed 0 \
    --start "$out/first/jbu.safetensors"
phase "$out/third" --seed 1 \
    --model efficientnet_lite0_stride32 efficientnet_lite0_stride32 efficientnet_lite0 "$vit" \
    --steps 300 --image-size 224 --region-weight 0.3 --region-field 1 --lr 0.003 \
    --start "$out/second/jbu.safetensors"

# weights/jbu_denoise.safetensors is the first phase behind a stage that is not trained; in
# weights/jbu_faithful.safetensors that stage does not smooth, and a fourth phase trains the rest of
# it with the others.
python -m benchmarks.add_joint_stage "$out/first/jbu.safetensors" "$out/jbu_denoise.safetensors"
python -m benchmarks.add_joint_stage "$out/third/jbu.safetensors" "$out/joint.safetensors" \
    --smoothing-spatial 0 --smoothing-range 0.19 --share 0.3
phase "$out/fourth" --seed 2 \
    --model efficientnet_lite0_stride32 efficientnet_lite0_stride32 efficientnet_lite0 "$vit" \
    --steps 300 --image-size 224 --region-weight 0.3 --region-field 1 --lr 0.003 \
    --start "$out/joint.safetensors"
