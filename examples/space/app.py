"""The demo as a Hugging Face Space."""

from pathlib import Path

from featup_hub.demo import build
from featup_hub.image import read_image

photos = sorted(Path(__file__).parent.glob("*.jpg"))[:2]  # add two photographs of yours
page = build(
    [read_image(photo) for photo in photos],
    model="efficientnet_lite0",
    upsampler="jbu_denoise",
)

if __name__ == "__main__":
    page.launch()
