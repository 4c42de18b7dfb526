"""A segmentation network with our upsampler as the decoder, trained end to end.

Run: python examples/segmentation_head.py LAYOUT:FOLDER [jbu|bilinear] [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featup_hub
from featup_hub.evaluation.dataset import Dataset
from featup_hub.evaluation.layouts import open_data
from featup_hub.evaluation.scores import confusion, mean_iou


class Bilinear(nn.Module):
    """The same encoder and head, with plain interpolation behind them."""

    def __init__(self, model: featup_hub.UpsampledBackbone, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits, (B, classes, H, W)."""
        return F.interpolate(self.head(self.model.source(image)), image.shape[-2:], mode="bilinear")


def build(classes: int, decoder: str = "jbu") -> nn.Module:
    """Folds the head in: it runs at low resolution, and classes are upsampled, not channels."""
    model = featup_hub.load("efficientnet_lite0")
    head = nn.Conv2d(model.feat_dim, classes, 1)
    return (model.fold_head(head) if decoder == "jbu" else Bilinear(model, head)).eval()


def crops(data: Dataset, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws four images, a random square of each, mirrored half of the time."""
    images, labels = [], []
    for index in torch.randint(len(data), (4,), generator=generator).tolist():
        mirrored = torch.rand((), generator=generator) < 0.5
        sample = data[index].mirror() if mirrored else data[index]
        spare = [max(length - side, 0) for length in sample.image.shape[-2:]]
        y, x = (int(torch.randint(n + 1, (), generator=generator)) for n in spare)
        images.append(sample.normalised()[..., y : y + side, x : x + side])
        labels.append(sample.labels[None, y : y + side, x : x + side])
    return torch.cat(images), torch.cat(labels)


def train(network: nn.Module, data: Dataset, steps: int, *, side: int = 256, seed: int = 0) -> None:
    """Trains every parameter; in evaluation mode, so statistics of batches stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images, labels = crops(data, side, generator)
        loss = F.cross_entropy(network(images), labels, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"\rstep {step}: loss {loss:.3f}", end="", flush=True)


def main(spec: str, decoder: str = "jbu", steps: str = "1000") -> None:
    """Trains on a data set (``featup-hub evaluate --help`` tells how to name one) and tests."""
    val = open_data(spec, "val")
    network = build(val.classes, decoder)
    train(network, open_data(spec, "train"), int(steps))
    counts = torch.zeros(val.classes, val.classes)
    for sample in (val[index].crop(16) for index in range(len(val))):
        with torch.inference_mode():
            labels = network(sample.normalised())[0].argmax(0)
        counts += confusion(labels, sample.labels, val.classes)
    print(f", mIoU {100 * float(mean_iou(counts)):.2f}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4 or sys.argv[2:3] not in ([], ["jbu"], ["bilinear"]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
