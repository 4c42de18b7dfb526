"""What memory and time does a big image take in tiles?

python -m benchmarks.tiles --side 4096 --channels 384 --max-bytes 1000000000

Random features at stride 16 are upsampled to the image's size and written to a memory-mapped
file, which needs side² · channels · 4 bytes of disk. Told are the time and the peak of the
process's own memory (Linux: RssAnon, sampled; pages of the file are the system's cache).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from featup_hub import JBUStack
from featup_hub.upsamplers.tiled import upsample_tiled


def main() -> None:
    """Runs once and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--max-bytes", type=int, default=200_000_000)
    parser.add_argument("--folder", type=Path, help="for the file (default: a temporary one)")
    args = parser.parse_args()
    torch.manual_seed(0)
    stack = JBUStack().eval()
    source = torch.randn(1, args.channels, args.side // 16, args.side // 16)
    image = torch.randn(1, 3, args.side, args.side)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, Peak() as peak:
        mapped = np.lib.format.open_memmap(
            Path(folder, "features.npy"),
            mode="w+",
            dtype=np.float32,
            shape=(1, args.channels, args.side, args.side),
        )
        start = time.perf_counter()
        upsample_tiled(stack, source, image, out=torch.from_numpy(mapped), max_bytes=args.max_bytes)
        mapped.flush()
        seconds = time.perf_counter() - start
    print(
        f"{args.side}² at {args.channels} channels, max_bytes {args.max_bytes / 1e6:.0f} MB: "
        f"{peak.most / 1e6:.0f} MB above the start, file of {mapped.nbytes / 1e6:.0f} MB, "
        f"{seconds:.1f} s with {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


class Peak:
    """Samples the anonymous memory of this process while it lasts, in bytes above its start."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Notes the maximum, every few milliseconds."""
        while not self.done.wait(0.005):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.most -= self.start


def anonymous() -> int:
    """Returns the anonymous resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
