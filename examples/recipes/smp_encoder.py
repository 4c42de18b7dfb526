"""An encoder of segmentation_models_pytorch with an upsampler in place of a decoder."""

import segmentation_models_pytorch as smp
import torch

from featup_hub import ModuleBackbone, UpsampledBackbone, load_upsampler

encoder = smp.encoders.get_encoder("resnet18", weights=None)  # "imagenet": with its weights
backbone = ModuleBackbone(
    encoder, feat_dim=encoder.out_channels[-1], patch_size=encoder.output_stride
)
model = UpsampledBackbone(backbone, load_upsampler(pretrained=False))
head = smp.base.SegmentationHead(backbone.feat_dim, out_channels=2, kernel_size=1)
segment = torch.nn.Sequential(model, head).eval()

with torch.inference_mode():
    logits = segment(torch.randn(1, 3, 64, 96))  # (1, 2, 64, 96)
