"""How many training images a second the loader alone makes ready, by augmentation and number of threads.

    python -m bench.loading [--side 448] [--batch 8] [--seconds 2] [--threads 1 2]

`before` is the way until now: albumentations, one image after another in the thread that trains, copied twice into a
batch. `now` is what a GPU is fed with: batches that threads write in place as uint8, page-locked where there is a GPU.
Both change images in the same ways (tests/model/test_augment.py). CPU ms are those of all cores, an image.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from model import layouts, synthetic
from model.config import RunConfig
from model.data import Cache, host_batches, open_cache

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "flips": {"augment_flips": True},
    "flips, turns, brightness, colour": {
        "augment_flips": True, "augment_quarter_turns": True, "augment_brightness": 0.3, "augment_color": 0.3,
    },
    "none, weighted loss": {"weighted_loss": True},
}  # fmt: skip


def weight_before(mask: np.ndarray, config: RunConfig) -> np.ndarray:
    """With scipy's distances."""
    distance = ndimage.distance_transform_edt(mask)
    weight = np.ones(mask.shape)
    inside = mask > 0
    share = distance[inside] / np.full_like(distance, distance.max(initial=0))[inside]
    weight[inside] = config.weight_maximum * share**config.weight_power
    return weight


def before(cache: Cache, config: RunConfig, steps: Iterator[np.ndarray]) -> Iterator[int]:
    """Makes one batch after another; yields how many images each has."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would call home on import
    import albumentations

    limits = config.augment_brightness, config.augment_color
    light, colour = ((-limits[0], limits[0]), (1 - limits[1], 1 + limits[1]))
    chosen: list[albumentations.BasicTransform] = []
    if config.augment_flips:
        chosen += [albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)]
    if config.augment_quarter_turns:
        chosen.append(albumentations.RandomRotate90(p=1.0))
    if config.augment_brightness:
        chosen.append(albumentations.RandomBrightnessContrast(light, light, p=1.0))
    if config.augment_color:
        hue = (-limits[1] / 2, limits[1] / 2)
        chosen.append(albumentations.ColorJitter((1.0, 1.0), (1.0, 1.0), colour, hue, p=1.0))
    pipeline = albumentations.Compose(chosen)
    for rows in steps:
        pairs = []
        for n in rows:
            image, mask = np.asarray(cache.images[n]), np.asarray(cache.masks[n])
            if chosen:
                pipeline.set_random_seed(int(np.random.default_rng((0, 0, int(n))).integers(2**31)))
                changed = pipeline(image=image, mask=mask)
                image, mask = changed["image"], changed["mask"]
            pairs.append((image, mask))
        masks = np.stack([mask for _, mask in pairs]) * cache.segmented[rows][:, None, None].astype(np.uint8)
        if config.weighted_loss:
            np.stack([weight_before(mask, config) for mask in masks])
        np.array(np.stack([image for image, _ in pairs]))
        yield len(rows)


def now(cache: Cache, config: RunConfig, steps: Iterator[np.ndarray], threads: int) -> Iterator[int]:
    """The same by threads, ahead of time."""
    with closing(host_batches(cache, config, 0, steps, threads, pinned=torch.cuda.is_available())) as made:
        for host in made:
            host.release(None)
            yield len(host.rows)


def rate(way: Callable[[Iterator[np.ndarray]], Iterator[int]], images: int, batch: int, seconds: float) -> list[float]:
    """Images a second, and CPU ms an image, after a first batch of each thread."""
    rng = np.random.default_rng(0)
    made = way(rng.integers(0, images, batch) for _ in iter(int, 1))
    for _ in range(8):
        next(made)
    began, used, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        done += next(made)
    took, used = time.perf_counter() - began, time.process_time() - used
    made.close()  # type: ignore[attr-defined]
    return [done / took, 1000 * used / done]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=448, help="px")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each rate")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    size = {"input_height": options.side, "input_width": options.side}
    with tempfile.TemporaryDirectory(prefix="segdec-bench-") as folder:
        synthetic.write(Path(folder) / "set", count=options.images, height=options.side, width=options.side)
        cache = open_cache(layouts.read(Path(folder) / "set"), options.side, options.side, Path(folder) / "cache")
        print(f"{options.side}x{options.side}, batches of {options.batch}, {os.cpu_count()} cores\n")
        print("| augmentation | way | images/s | CPU ms an image | to before |")
        print("| --- | --- | --- | --- | --- |")
        for name, fields in KINDS.items():
            config = RunConfig(**size, **fields)

            def measured(way: Callable[..., Iterator[int]], *arguments: Any, config: RunConfig = config) -> list[float]:
                return rate(
                    lambda steps: way(cache, config, steps, *arguments),
                    len(cache.samples),
                    options.batch,
                    options.seconds,
                )

            first = measured(before)
            print(f"| {name} | before | {first[0]:.0f} | {first[1]:.2f} | 1 |", flush=True)
            for threads in options.threads:
                found = measured(now, threads)
                way = f"now, {threads} thread{'s' if threads > 1 else ''}"
                print(f"| {name} | {way} | {found[0]:.0f} | {found[1]:.2f} | {found[0] / first[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
