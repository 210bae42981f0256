"""Building a cache of decoded images: our way, on all cores, against one file after another.

    python -m bench.decoding DATA [--side 448] [--images 1000] [--times 3]

Both ways read, hash, decode, resize and write the same images and masks in this one process, in turn, from files that
the kernel holds in memory, and must write the same bytes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from model import layouts
from model.data import cached, open_cache, resize_mask
from model.inspection import decode_image, decode_mask, digest, resize_image
from model.sample import Sample


def one_after_another(samples: list[Sample], side: int, folder: Path) -> Path:
    """As it was done before there were threads: every file is read twice."""
    images = open_memmap(folder / "images.npy", "w+", np.uint8, (len(samples), side, side, 3))
    masks = open_memmap(folder / "masks.npy", "w+", np.uint8, (len(samples), side, side))
    for n, sample in enumerate(samples):
        assert digest(sample.image) == sample.digest
        images[n] = resize_image(decode_image(sample.image), (side, side))
        if sample.mask is not None:
            assert digest(sample.mask) == sample.mask_digest
            masks[n] = resize_mask(decode_mask(sample.mask), (side, side))
    images.flush()
    masks.flush()
    return folder


def ours(samples: list[Sample], side: int, folder: Path) -> Path:
    open_cache(samples, side, side, folder)
    return cached(folder)[0][0]


def main() -> None:
    """Prints a line a repetition, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--images", type=int, default=1000, help="taken again from the start where there are fewer")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    found = layouts.read(options.data)
    samples = [found[n % len(found)] for n in range(options.images)]
    seconds: dict[str, list[float]] = {"one after another": [], "ours": []}
    for _ in range(options.times):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            made = []
            for (name, taken), way, folder in zip(
                seconds.items(), (one_after_another, ours), (first, second), strict=True
            ):
                began = time.perf_counter()
                made.append(way(samples, options.side, Path(folder)))
                taken.append(time.perf_counter() - began)
                print(f"{name}: {taken[-1]:.2f} s")
            assert all((made[0] / f).read_bytes() == (made[1] / f).read_bytes() for f in ("images.npy", "masks.npy"))
    medians = [float(np.median(taken)) for taken in seconds.values()]
    print(
        f"{options.images} images at {options.side} px on {len(os.sched_getaffinity(0))} cores: {medians[0]:.2f} s one "
        f"after another, {medians[1]:.2f} s ours, {medians[0] / medians[1]:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
