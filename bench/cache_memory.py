"""Memory of trials side by side: our memory-mapped cache against float32 tensors in each process.

    python -m bench.cache_memory [--images 2000] [--side 448] [--trials 1 2 4]

Every process goes through one epoch of batches (or of its own tensors) and then reports its anonymous memory: pages of
the cache's files belong to the kernel, which shares them between processes and drops them when it needs room. Linux
only: it reads /proc/self/smaps_rollup. A case that would not fit into memory is left out and said so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import cv2
import numpy as np
import torch

from bench.memory import own_mib
from model import layouts
from model.config import RunConfig
from model.data import batches, open_cache
from model.sample import Sample

_MIB = 2**20


def write_set(folder: Path, images: int, side: int) -> None:
    """Noise, which compresses badly: decoding is all that matters here."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for n in range(images):
        cv2.imwrite(str(folder / f"images/{n:05}.jpg"), rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        mask = np.zeros((side, side), np.uint8)
        mask[n % side] = 255 * (n % 4 > 0)
        cv2.imwrite(str(folder / f"masks/{n:05}.png"), mask)


def trial(kind: str, samples: list[Sample], side: int, root: Path, together: Barrier) -> tuple[float, float, float]:
    """Seconds until the data are ready, own MiB before and after an epoch through them."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    before = own_mib()
    began = time.perf_counter()
    if kind == "cache":
        cache = open_cache(samples, side, side, root)
        ready = time.perf_counter() - began
        config = RunConfig(input_height=side, input_width=side, frequency_sampling=False)
        for batch in batches(cache, config, 0, device):
            batch.images_BCHW.sum()
    else:
        images = torch.empty(len(samples), 3, side, side)
        for n, sample in enumerate(samples):
            images[n] = torch.from_numpy(cv2.imread(str(sample.image))).permute(2, 0, 1).float().div_(255)
        ready = time.perf_counter() - began
        for image in images:
            image.sum()
    together.wait()
    after = own_mib()
    together.wait()
    return ready, before, after


def measure(kind: str, count: int, samples: list[Sample], side: int, root: Path) -> list[tuple[float, float, float]]:
    """`count` processes at once."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        together = manager.Barrier(count)
        with context.Pool(count) as pool:
            return pool.starmap(trial, [(kind, samples, side, root, together)] * count)


def main() -> None:
    """Measures every case in one run and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=448, help="px")
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as scratch:
        folder, root = Path(scratch) / "set", Path(scratch) / "cache"
        write_set(folder, options.images, options.side)
        samples = layouts.read(folder)
        print("| data | trials | s until ready (slowest) | own MiB a trial | of that, since it began |")
        print("| --- | --- | --- | --- | --- |")
        for kind in ("cache", "tensors"):
            for count in options.trials:
                needed = count * options.images * options.side**2 * 3 * 4
                if kind == "tensors" and needed > 0.7 * available:
                    print(f"| {kind} | {count} | not run: needs {needed / 2**30:.1f} GiB | | |", flush=True)
                    continue
                found = measure(kind, count, samples, options.side, root)
                ready = max(row[0] for row in found)
                after = np.mean([row[2] for row in found])
                grown = np.mean([row[2] - row[1] for row in found])
                print(f"| {kind} | {count} | {ready:.1f} | {after:.0f} | {grown:.0f} |", flush=True)
        size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) / _MIB
        print(f"\nThe cache holds {size:.0f} MiB, once for all; the first trial above decoded it.")


if __name__ == "__main__":
    main()
