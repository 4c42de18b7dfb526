"""A DeepLab head of torchvision's on features at the image's resolution."""

import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import featup_hub

model = featup_hub.load("efficientnet_lite0", pretrained=False)  # True: with its weights
segment = nn.Sequential(model, DeepLabHead(model.feat_dim, num_classes=21)).eval()

with torch.inference_mode():
    logits = segment(torch.randn(1, 3, 64, 96))  # (1, 21, 64, 96)
