"""Does any damaged file crash a reader? Mutates good files at random and counts the outcomes.

    python benchmarks/fuzz_files.py --cases 100000
    python benchmarks/fuzz_files.py --readers checkpoint --cases 1000 --seed 7

Every case must be read or end in a ValueError that names the file, within five seconds and
without asking for 8 GiB. The command fails at the first that does not, and keeps its file.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from featup_hub import JBUStack, weights
from featup_hub.image import read_image

SECONDS, MEMORY = 5, 8 << 30
ROOT = Path(__file__).resolve().parents[1]


def good_weights(folder: Path) -> bytes:
    """A small file of weights as this package writes it."""
    tensors = {"weight": torch.rand(3, 4), "half": torch.ones(5).half(), "scalar": torch.ones(())}
    weights.write(tensors, folder / "good", metadata={"feat_dim": "4"})
    return (folder / "good").read_bytes()


def good_checkpoint(folder: Path) -> bytes:
    """A small checkpoint as upstream's trainer writes it."""
    state = {f"upsampler.{name}": t for name, t in JBUStack(2).state_dict().items()}
    norm = {"model.1.norm.weight": torch.ones(2), "model.1.norm.bias": torch.ones(2)}
    buffer = io.BytesIO()
    torch.save({"state_dict": {**state, **norm}, "epoch": 3}, buffer)
    return buffer.getvalue()


def good_config(folder: Path) -> bytes:
    """The config beside a saved upsampler, whose weights stay as they are."""
    JBUStack(2).save_pretrained(folder)
    return (folder / "config.json").read_bytes()


def good_image(folder: Path) -> bytes:
    """A small photograph."""
    from PIL import Image

    with Image.open(ROOT / "tests/data/chelsea.jpg") as photo:
        photo.resize((48, 32)).save(folder / "good", "JPEG")
    return (folder / "good").read_bytes()


# By name: what makes a good file, what reads it, and what the file is called.
Reader = tuple[Callable[[Path], bytes], Callable[[Path], object], str]
READERS: dict[str, Reader] = {
    "weights": (good_weights, weights.read, "model.safetensors"),
    "checkpoint": (good_checkpoint, weights.convert_upstream, "in.ckpt"),
    "config": (good_config, lambda path: JBUStack.from_pretrained(path.parent), "config.json"),
    "image": (good_image, read_image, "photo.jpg"),
}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Changes a file in one to four places."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        # Headers are short and decide most: half of all changes go there.
        end = min(len(out), 512) if draw.random() < 0.5 else len(out)
        at, size = draw.randrange(max(end, 1)), draw.randint(1, 8)
        kind = draw.randrange(6)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            out[at : at + size] = draw.choice([b"\0", b"\xff", b"9", b'"', b"}"]) * size
        elif kind == 3:
            del out[at : len(out) if draw.random() < 0.3 else at + size]
        elif kind == 4:
            out[at:at] = draw.randbytes(size)
        else:
            source = draw.randrange(max(len(out), 1))
            out[at : at + 64] = out[source : source + 64]
    return bytes(out)


def fuzz(name: str, cases: int, seed: int) -> Counter[str]:
    """Runs one reader and counts its outcomes."""
    make, read, filename = READERS[name]
    draw, outcomes, slowest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, filename)
        data = make(Path(folder))
        path.write_bytes(data)
        read(path)
        for case in range(cases):
            path.write_bytes(bad := mutated(data, draw))
            signal.alarm(SECONDS)
            start = time.perf_counter()
            try:
                read(path)
                outcomes["read"] += 1
            except BaseException as error:
                if type(error) is ValueError and str(path.parent) in str(error):
                    outcomes["refused"] += 1
                    continue
                kept = Path(f"fuzz-{name}-{seed}-{case}.bin")
                kept.write_bytes(bad)
                sys.exit(f"{name}, case {case}: {type(error).__name__}: {error}; kept {kept}")
            finally:
                signal.alarm(0)
                slowest = max(slowest, time.perf_counter() - start)
    outcomes["slowest_ms"] = round(1000 * slowest)
    return outcomes


def main() -> None:
    """Runs the readers asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--cases", type=int, default=100_000, help="files per reader")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in arguments.readers:
        outcomes = fuzz(name, arguments.cases, arguments.seed)
        print(json.dumps({"reader": name, "cases": arguments.cases, **outcomes}), flush=True)


if __name__ == "__main__":
    main()
