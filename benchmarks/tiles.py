"""Measures memory and time of a big image in tiles.

python -m benchmarks.tiles --side 4096 --channels 384 --max-bytes 1000000000

Random features at stride 16 are upsampled to the image's size and written to a memory-mapped
file, which needs side² · channels · 4 bytes of disk. Reports the time and two peaks of resident
memory (Linux, sampled): RssAnon, the process's own, and RssFile, pages of files, most of them the
output's. The system may take the latter back whenever it likes; the benchmark hands them back
itself beyond a bound, so that the sum is bounded, too.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from featup_hub import JBUStack
from featup_hub.upsamplers.tiled import upsample_tiled

MOST_PAGES = 1_000_000_000


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
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        mapped = np.lib.format.open_memmap(
            Path(folder, "features.npy"),
            mode="w+",
            dtype=np.float32,
            shape=(1, args.channels, args.side, args.side),
        )
        out, start = torch.from_numpy(mapped), time.perf_counter()
        with Peak(mapped) as peak:
            upsample_tiled(stack, source, image, out=out, max_bytes=args.max_bytes)
        seconds = time.perf_counter() - start
        if not out[:, ::37, ::61, ::61].all():
            raise RuntimeError("a pixel of the output was never written")
    print(
        f"{args.side}² at {args.channels} channels, max_bytes {args.max_bytes / 1e6:.0f} MB: "
        f"RssAnon {peak.anonymous / 1e6:.0f} MB, {peak.added / 1e6:.0f} MB above the start; "
        f"RssFile {peak.file / 1e6:.0f} MB; RSS {peak.total / 1e6:.0f} MB; "
        f"file of {mapped.nbytes / 1e6:.0f} MB, {seconds:.1f} s, of the CPU "
        f"{time.process_time():.1f} s, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


class Peak:
    """Samples the resident memory of this process while it lasts, in bytes.

    Attributes:
        anonymous: Most of the process's own memory.
        added: The same above what it was at the start.
        file: Most pages of files.
        total: Most of both together.
    """

    def __init__(self, mapped: np.memmap) -> None:
        self.pages = mapped._mmap  # the mapping itself, which NumPy does not offer otherwise
        self.anonymous = self.added = self.file = self.total = 0

    def __enter__(self) -> Peak:
        self.start, _ = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Notes the maxima every few milliseconds, and lets go of the output's pages."""
        while not self.done.wait(0.005):
            anonymous, file = resident()
            self.anonymous = max(self.anonymous, anonymous)
            self.file = max(self.file, file)
            self.total = max(self.total, anonymous + file)
            if file > MOST_PAGES:
                self.pages.madvise(mmap.MADV_DONTNEED)  # of a shared file: nothing is lost

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.added = self.anonymous - self.start


def resident() -> tuple[int, int]:
    """Returns the resident memory of this process, its own and of files, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0]: 1024 * int(words[1]) for words in lines if words[0].startswith("Rss")}
    return sizes["RssAnon:"], sizes["RssFile:"]


if __name__ == "__main__":
    main()
