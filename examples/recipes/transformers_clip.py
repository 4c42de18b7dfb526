"""CLIP's image tower from transformers, with interpolated position embeddings."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from featup_hub import ModuleBackbone, UpsampledBackbone, load_upsampler

# With weights: CLIPVisionModel.from_pretrained("openai/clip-vit-base-patch16")
config = CLIPVisionConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=16)
backbone = ModuleBackbone(
    CLIPVisionModel(config),
    feat_dim=config.hidden_size,
    patch_size=config.patch_size,
    prefix_tokens=1,
    call=lambda clip, image: clip(image, interpolate_pos_encoding=True),
)
model = UpsampledBackbone(backbone, load_upsampler(pretrained=False)).eval()
with torch.inference_mode():
    features = model(torch.randn(1, 3, 64, 96))  # (1, 24, 64, 96)
