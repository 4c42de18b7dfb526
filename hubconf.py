"""Entry points of torch.hub: one function per model.

Every one but ``jbu`` returns an image -> features module in evaluation mode::

    import torch
    model = torch.hub.load("OWNER/featup_hub", "efficientnet_lite0", trust_repo=True)
    features = model(image)  # (B, 3, H, W) -> (B, C, H, W)

Images are RGB, normalised by ``model.mean`` and ``model.std``, of any size. The arguments,
of which all but the first two are handed to ``featup_hub.load``:

    pretrained: False draws random weights in place of loading any.
    use_norm: Whether every position's vector is normalised before upsampling.
    upsampler: "jbu_denoise", the default, which averages cells that look alike; "jbu_faithful",
        which keeps every cell's features; or a file of your own.
    backbone_weights: Path of your own weights for the backbone, laid out as timm's.
    layer: Which features of the backbone; default: the deepest of the model's stride.
    looks: Passes of the backbone over shifted images, every second one mirrored: 1, 4 or the
        square of another divisor of its stride. More of them make features sharper.

Licences and training data of the weights: ``featup-hub models`` and featup_hub/registry.py.
"""

from featup_hub.loading import load as _load
from featup_hub.loading import load_upsampler as _load_upsampler

dependencies = ["torch", "timm", "huggingface_hub", "safetensors"]


def efficientnet_lite0(pretrained=True, use_norm=True, **options):
    """EfficientNet-Lite0, stride 16: shipped, works without a network."""
    return _load("efficientnet_lite0", pretrained=pretrained, use_norm=use_norm, **options)


def efficientnet_lite0_stride32(pretrained=True, use_norm=True, **options):
    """EfficientNet-Lite0, stride 32: shipped, works without a network."""
    return _load("efficientnet_lite0_stride32", pretrained=pretrained, use_norm=use_norm, **options)


def vit(pretrained=True, use_norm=True, **options):
    """ViT-S/16 trained on ImageNet labels."""
    return _load("vit", pretrained=pretrained, use_norm=use_norm, **options)


def dino16(pretrained=True, use_norm=True, **options):
    """DINO ViT-S/16."""
    return _load("dino16", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-S/14."""
    return _load("dinov2", pretrained=pretrained, use_norm=use_norm, **options)


def clip(pretrained=True, use_norm=True, **options):
    """CLIP ViT-B/16, patch tokens in the space of its text embeddings."""
    return _load("clip", pretrained=pretrained, use_norm=use_norm, **options)


def maskclip(pretrained=True, use_norm=True, **options):
    """MaskCLIP: CLIP ViT-B/16, values of the last block in the space of text embeddings."""
    return _load("maskclip", pretrained=pretrained, use_norm=use_norm, **options)


def resnet50(pretrained=True, use_norm=True, **options):
    """ResNet-50 trained on ImageNet labels."""
    return _load("resnet50", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vitb14(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-B/14."""
    return _load("dinov2_vitb14", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vitl14(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-L/14."""
    return _load("dinov2_vitl14", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vitg14(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-g/14."""
    return _load("dinov2_vitg14", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vits14_reg(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-S/14 with registers."""
    return _load("dinov2_vits14_reg", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vitb14_reg(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-B/14 with registers."""
    return _load("dinov2_vitb14_reg", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vitl14_reg(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-L/14 with registers."""
    return _load("dinov2_vitl14_reg", pretrained=pretrained, use_norm=use_norm, **options)


def dinov2_vitg14_reg(pretrained=True, use_norm=True, **options):
    """DINOv2 ViT-g/14 with registers."""
    return _load("dinov2_vitg14_reg", pretrained=pretrained, use_norm=use_norm, **options)


def dinov3_vits16(pretrained=True, use_norm=True, **options):
    """DINOv3 ViT-S/16. Weights under the DINOv3 License, which is not open source."""
    return _load("dinov3_vits16", pretrained=pretrained, use_norm=use_norm, **options)


def dinov3_vitb16(pretrained=True, use_norm=True, **options):
    """DINOv3 ViT-B/16. Weights under the DINOv3 License, which is not open source."""
    return _load("dinov3_vitb16", pretrained=pretrained, use_norm=use_norm, **options)


def siglip2_vitb16(pretrained=True, use_norm=True, **options):
    """SigLIP 2 ViT-B/16."""
    return _load("siglip2_vitb16", pretrained=pretrained, use_norm=use_norm, **options)


def jbu(pretrained=True, **options):
    """The upsampler alone, for features of your own: upsampler(source, image) -> features."""
    return _load_upsampler(pretrained=pretrained, **options)
