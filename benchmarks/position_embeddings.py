"""Compares timm's position embeddings with Meta's for DINOv2 at other image sizes.

    python -m benchmarks.position_embeddings FILE > benchmarks/results/position_embeddings.csv

timm resamples the 37×37 embeddings of DINOv2 by an antialiased bicubic filter; Meta's code by one
that is not antialiased, to sizes with 0.1 added. FILE holds weights of DINOv2 ViT-S/14.

Source: facebookresearch/dinov2 (Apache-2.0), ``interpolate_pos_encoding``, for Meta's formula.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from featup_hub.backbones import TimmBackbone
from featup_hub.image import preprocess, read_image
from featup_hub.weights import read_state

NAME = "vit_small_patch14_dinov2"
PHOTO = Path(__file__).resolve().parents[1] / "tests/data/chelsea.jpg"
SIZES = ((224, 224), (336, 448), (448, 672), (518, 518), (700, 1050))


@torch.inference_mode()
def main() -> None:
    """Prints a row for every size."""
    state = read_state(sys.argv[1])
    grid = state["pos_embed"][:, 1:].unflatten(1, (37, 37)).movedim(-1, 1)
    print("height,width,embeddings_relative,features_relative,features_cosine")
    for size in SIZES:
        fixed = {"img_size": size, "dynamic_img_size": False}
        backbone = TimmBackbone(NAME, weights=state, backbone_kwargs=fixed).eval()
        image = preprocess(read_image(PHOTO), size, mean=backbone.mean, std=backbone.std)
        timms, embedding = backbone(image), backbone.model.pos_embed[:, 1:]
        scale = tuple((side // 14 + 0.1) / 37 for side in size)
        meta = grid if size == (518, 518) else F.interpolate(grid, None, scale, mode="bicubic")
        meta = meta.flatten(2).mT
        apart = (meta - embedding).norm() / embedding.norm()
        embedding.copy_(meta)
        metas = backbone(image)
        relative = (metas - timms).norm() / timms.norm()
        cosine = F.cosine_similarity(metas, timms).mean()
        print(f"{size[0]},{size[1]},{apart:.4f},{relative:.4f},{cosine:.5f}", flush=True)


if __name__ == "__main__":
    main()
