"""SigLIP from transformers: tokens without a class token, trained on images of [-1, 1]."""

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from featup_hub import ModuleBackbone, UpsampledBackbone, load_upsampler

# With weights: SiglipVisionModel.from_pretrained(...)
config = SiglipVisionConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
backbone = ModuleBackbone(
    SiglipVisionModel(config),
    feat_dim=config.hidden_size,
    patch_size=config.patch_size,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    call=lambda siglip, image: siglip(image, interpolate_pos_encoding=True),
)
model = UpsampledBackbone(backbone, load_upsampler(pretrained=False)).eval()
with torch.inference_mode():
    features = model(torch.randn(1, 3, 64, 96))  # (1, 24, 64, 96)
