"""DINOv3 from transformers: a class token and registers before those of the image."""

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from featup_hub import ModuleBackbone, UpsampledBackbone, load_upsampler

# With weights: DINOv3ViTModel.from_pretrained("facebook/dinov3-vits16-pretrain-lvd1689m")
config = DINOv3ViTConfig(
    hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_register_tokens=4
)
size, prefix = config.hidden_size, 1 + config.num_register_tokens
backbone = ModuleBackbone(
    DINOv3ViTModel(config), feat_dim=size, patch_size=config.patch_size, prefix_tokens=prefix
)
model = UpsampledBackbone(backbone, load_upsampler(pretrained=False)).eval()
with torch.inference_mode():
    features = model(torch.randn(1, 3, 64, 96))  # (1, 24, 64, 96)
