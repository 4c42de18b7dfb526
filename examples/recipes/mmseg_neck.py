"""The upsampler as mmsegmentation's neck; the backbone returns the image before its levels."""

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from featup_hub import load_upsampler


@MODELS.register_module()  # model=dict(..., neck=dict(type="JBUNeck"), decode_head=...)
class JBUNeck(BaseModule):
    """Takes (image, *levels), returns the levels, the last at the image's resolution."""

    def __init__(self, pretrained=True):
        super().__init__()
        self.upsampler = load_upsampler(pretrained=pretrained)

    def forward(self, levels):
        """Upsamples the last level; ``levels[0]`` is the image."""
        image, *levels = levels
        return (*levels[:-1], self.upsampler(levels[-1], image))
