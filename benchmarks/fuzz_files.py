"""Mutates good files at random and counts the outcomes of readers.

    python -m benchmarks.fuzz_files --cases 100000
    python -m benchmarks.fuzz_files --readers checkpoint --cases 1000 --seed 7

Every case must be read or end in a ValueError that names the file, within five seconds of
processor time and within 8 GiB of address space. The command fails at the first that does not, and
keeps its file.
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
from PIL import Image
from safetensors.torch import load, save

from featup_hub import ImplicitUpsampler, JBUStack, weights
from featup_hub.image import read_image

# Address space, of which PyTorch takes 3 GiB. A PNG's chunk may claim 4 GiB, and Pillow asks for
# what it claims, without touching it, before it notes that the file ends.
SECONDS, MEMORY = 5, 8 << 30
ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")


class TooSlowError(BaseException):
    """No Exception, so that no reader takes it for damage."""


def saved(content: object, **options: bool) -> bytes:
    """Returns what torch.save writes."""
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def good_files(name: str, folder: Path) -> list[bytes]:
    """Makes small good files for a reader, in every format that people have."""
    if name == "weights":  # as this package writes them, and as others do, without a digest
        tensors = {"weight": torch.rand(3, 4), "half": torch.ones(5).half(), "one": torch.ones(())}
        weights.write(tensors, folder / "good", metadata={"feat_dim": "4"})
        return [(folder / "good").read_bytes(), save(tensors)]
    if name == "checkpoint":  # as upstream's trainer writes it
        state = {f"upsampler.{name}": t for name, t in JBUStack(2).state_dict().items()}
        norm = {"model.1.norm.weight": torch.ones(2), "model.1.norm.bias": torch.ones(2)}
        return [saved({"state_dict": {**state, **norm}, "epoch": 3})]
    if name == "backbone":
        state = {
            "cls_token": torch.rand(1, 1, 4),
            "patch_embed.proj.weight": torch.rand(4, 3, 2, 2),
        }
        checkpoint = {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
        old = saved(state, _use_new_zipfile_serialization=False)
        return [save(state), saved(state), saved(checkpoint), old]
    if name == "config":  # the one beside a saved upsampler, whose weights stay as they are
        JBUStack(2).save_pretrained(folder)
        return [(folder / "config.json").read_bytes()]
    if name == "image":
        files = []
        with Image.open(ROOT / "tests/data/chelsea.jpg") as photo:
            for kind in FORMATS:
                photo.resize((24, 16)).save(buffer := io.BytesIO(), kind)
                files.append(buffer.getvalue())
        return files
    options = {"frequencies": 2, "hidden": 4}
    fit = ImplicitUpsampler(torch.rand(1, 3, 4, 6), torch.zeros(3), torch.rand(3, 2), **options)
    fit.scores = {"r2": 1.0}
    fit.save(folder / "good")
    return [(folder / "good").read_bytes()]


def miswritten(data: bytes, draw: random.Random) -> bytes:
    """Writes a whole file of weights with a tensor or a note left out, renamed or replaced."""
    if draw.random() < 0.5:
        return mutated(data, draw)
    end = 8 + int.from_bytes(data[:8], "little")
    notes = json.loads(data[8:end])["__metadata__"]
    del notes["content_sha256"]  # else damage is detected before any content is read
    tensors = load(data)
    name, note = draw.choice(sorted(tensors)), draw.choice(sorted(notes))
    kind = draw.randrange(5)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}.more"] = tensors.pop(name)
    elif kind == 2:
        shape = [draw.randrange(4) for _ in range(draw.randrange(6))]
        tensors[name] = torch.zeros(shape, dtype=draw.choice([torch.float32, torch.int64]))
    elif kind == 3:
        del notes[note]
    else:
        notes[note] = draw.choice(["", "[]", "{", "null", "9" * 5000, "[" * 5000, '{"r2": NaN}'])
    return save(tensors, metadata=notes)


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


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # name of the file, reader
    "weights": ("model.safetensors", weights.read),
    "backbone": ("in.pth", weights.read_state),
    "checkpoint": ("in.ckpt", weights.convert_upstream),
    "config": ("config.json", lambda path: JBUStack.from_pretrained(path.parent)),
    "image": ("photo", read_image),
    "fit": ("fit.safetensors", lambda path: ImplicitUpsampler.load(path).features((2, 3))),
}


def fuzz(name: str, cases: int, seed: int) -> dict[str, int]:
    """Runs one reader and counts its outcomes."""
    filename, read = READERS[name]
    spoil = miswritten if name == "fit" else mutated
    draw, outcomes, slowest = random.Random(seed), Counter[str](), 0.0
    # In memory where the system offers it: the disk is not what is tested.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        path = Path(folder, filename)
        files = good_files(name, Path(folder))
        path.write_bytes(files[0])
        read(path)
        for case in range(cases):
            path.write_bytes(bad := spoil(draw.choice(files), draw))
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(path)
                outcome = "read"
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                outcome = "refused"
                if not is_documented(error, path):
                    kept = Path(f"fuzz-{name}-{seed}-{case}.bin")
                    kept.write_bytes(bad)
                    sys.exit(f"{name}, case {case}: {type(error).__name__}: {error}; kept {kept}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
            outcomes[outcome] += 1
    return {**outcomes, "slowest_ms": round(1000 * slowest)}


def is_documented(error: BaseException, path: Path) -> bool:
    """Tells whether a reader may raise this: a ValueError with the file's name, not of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            return False
        cause = cause.__cause__ or cause.__context__
    return type(error) is ValueError and str(path.parent) in str(error)


def stop(number: int, frame: object) -> None:
    """Ends a reader that takes too long."""
    raise TooSlowError(f"more than {SECONDS} s of processor time")


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
    signal.signal(signal.SIGPROF, stop)
    for name in arguments.readers:
        start = time.process_time()
        outcomes = fuzz(name, arguments.cases, arguments.seed)
        row = {"reader": name, "cases": arguments.cases, **outcomes}
        row["cpu_s"] = round(time.process_time() - start)
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
