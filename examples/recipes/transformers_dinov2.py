"""DINOv2 from transformers: tokens; the first is the class token."""

import torch
from transformers import Dinov2Config, Dinov2Model

from featup_hub import ModuleBackbone, UpsampledBackbone, load_upsampler

# With weights: Dinov2Model.from_pretrained("facebook/dinov2-small")
dino = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2))
size, patch = dino.config.hidden_size, dino.config.patch_size
backbone = ModuleBackbone(dino, feat_dim=size, patch_size=patch, prefix_tokens=1)
model = UpsampledBackbone(backbone, load_upsampler(pretrained=False)).eval()

with torch.inference_mode():
    features = model(torch.randn(1, 3, 64, 96))  # (1, 24, 64, 96)
