"""Features of a folder of images by a pool of Ray actors: a file per image, restartable."""

import sys
from pathlib import Path

import ray
import torch

import featup_hub
from featup_hub import weights
from featup_hub.image import preprocess, read_image


class Extract:
    """Holds a model in every actor."""

    def __init__(self, out: Path) -> None:
        self.out, self.model = out, featup_hub.load("efficientnet_lite0")

    def __call__(self, batch: dict) -> dict:
        """Writes the features of some images, each file whole or not at all."""
        model = self.model
        norm = {"mean": model.mean, "std": model.std, "multiple_of": model.patch_size}
        for path in map(Path, batch["path"]):
            with torch.inference_mode():
                features = model(preprocess(read_image(path), 224, **norm))[0].half()
            weights.write({"features": features}, self.out / f"{path.name}.safetensors")
        return batch


def extract(photos: Path, out: Path, *, actors: int = 2) -> int:
    """Makes the files that are missing and returns their number; call it again after a stop."""
    out.mkdir(parents=True, exist_ok=True)
    todo = [p for p in photos.glob("*.jpg") if not (out / f"{p.name}.safetensors").exists()]
    data = ray.data.from_items([{"path": str(path)} for path in sorted(todo)])
    pool = ray.data.ActorPoolStrategy(size=actors)
    made = data.map_batches(Extract, fn_constructor_args=(out,), batch_size=4, compute=pool)
    return made.materialize().count() if todo else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(extract(Path(sys.argv[1]), Path(sys.argv[2])))
