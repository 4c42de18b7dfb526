"""A feature pyramid network of torchvision's on every resolution that the upsampler passes."""

import torch
from torchvision.ops import FeaturePyramidNetwork

import featup_hub

model = featup_hub.load("efficientnet_lite0", pretrained=False)  # True: with its weights
fpn = FeaturePyramidNetwork([model.feat_dim] * 5, out_channels=32)

image = torch.randn(1, 3, 64, 96)
with torch.inference_mode():
    source = model.source(image)
    kernels = model.upsampler.kernels(image, tuple(source.shape[2:]))  # once, for any features
    levels = model.upsampler.pyramid(source, kernels)  # strides 16, 8, 4, 2, 1
    maps = fpn({str(i): level for i, level in enumerate(reversed(levels))})  # finest first
