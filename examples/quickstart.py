"""High-resolution features of a photograph, and a picture of them.

Run: python examples/quickstart.py [IMAGE] [PICTURE]
"""

import sys
from pathlib import Path

import torch

import featup_hub
from featup_hub.image import resize

CAT = Path(__file__).resolve().parents[1] / "tests/data/chelsea.jpg"


def main(image: str | Path = CAT, picture: str | Path = "features.png") -> None:
    """Upsamples the features of an image and draws them."""
    model = featup_hub.load("efficientnet_lite0")
    photo = resize(featup_hub.read_image(image), 224, multiple_of=model.patch_size)
    x = model.preprocess(photo)  # (1, 3, H, W)

    with torch.inference_mode():
        features = model(x)  # (1, C, H, W): one vector for every pixel
        source = model.source(x)  # (1, C, h, w): the backbone's own features

    print(f"{tuple(source.shape)} -> {tuple(features.shape)}")
    featup_hub.comparison(photo, source, features).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
