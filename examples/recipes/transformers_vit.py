"""A ViT of transformers that interpolates its position embeddings."""

import torch
from transformers import ViTConfig, ViTModel

from featup_hub import ModuleBackbone, UpsampledBackbone, load_upsampler

# With weights: ViTModel.from_pretrained(...)
config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
backbone = ModuleBackbone(
    ViTModel(config, add_pooling_layer=False),
    feat_dim=config.hidden_size,
    patch_size=config.patch_size,
    prefix_tokens=1,
    call=lambda vit, image: vit(image, interpolate_pos_encoding=True),
)
model = UpsampledBackbone(backbone, load_upsampler(pretrained=False)).eval()
with torch.inference_mode():
    features = model(torch.randn(1, 3, 64, 96))  # (1, 24, 64, 96)
