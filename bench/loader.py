"""The loader alone, by augmentation, batch and threads, against what training takes.

    python -m bench.loader [--batches 1 10 32] [--loader-threads 1 4 16] [--seconds 2] [--device cpu]

Images lie decoded in memory, as after a trial's first epoch; batches arrive whole on the device and are thrown away.
Training is measured on the same split in the same run, without augmentation. For a GPU the loader has threads. On a CPU
it has none of its own, since both want the same cores: one that is so many times as fast takes one part in so many of
the time.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
from collections.abc import Generator
from contextlib import closing

import torch

from bench.measure import Table, config_of, now, options_of, repeated, split_of
from bench.training_step import Fast, epoch_rate, fitting
from model import data
from model.config import RunConfig
from model.data import Cache
from model.sample import Batch

AUGMENTATIONS = {  # the others where albumentations is
    "none": {},
    "flips": {"augment_flips": True},
    "all": {
        "augment_flips": True,
        "augment_quarter_turns": True,
        "augment_brightness": 0.2,
        "augment_color": 0.1,
    },
}


def batches(cache: Cache, config: RunConfig, device: torch.device, threads: int) -> Generator[Batch]:
    """An epoch's, as training has them."""
    return data.prefetched(cache, config, 0, device, data.step_rows(cache, config, 0), threads)


def loaded(cache: Cache, config: RunConfig, device: torch.device, threads: int, seconds: float) -> float:
    """Images a second over whole epochs, after a few batches to warm up."""
    with closing(batches(cache, config, device, threads)) as some:
        list(itertools.islice(some, 3))
    began, done = now(device), 0
    while True:
        with closing(batches(cache, config, device, threads)) as some:
            for batch in some:
                done += len(batch.rows)
                if time.perf_counter() - began > seconds:
                    return done / (now(device) - began)


def compare(options: argparse.Namespace, cache: Cache) -> None:
    """One table."""
    print(f"{options.height}x{options.width} px, width {options.width_factor:g}\n")
    shown = Table("batch", "augmentation", "threads", "images/s", "times what training takes")
    for batch in options.batches:
        config = config_of(options, batch_size=batch)
        fast = Fast(config, options.device)
        needed = epoch_rate(fast, fitting(fast, cache, options.device, options.seconds), options.device)
        shown.add(batch, "(training)", "", f"{needed:.1f}", "1.0")
        split = repeated(cache, max(1024, 8 * batch))
        for name, fields in AUGMENTATIONS.items():
            if fields and importlib.util.find_spec("albumentations") is None:
                continue
            if "augment_quarter_turns" in fields and options.height != options.width:
                fields = fields | {"augment_quarter_turns": False}
            augmented = config_of(options, batch_size=batch, **fields)
            for threads in options.loader_threads:
                rate = loaded(split, augmented, options.device, threads, options.seconds)
                shown.add(batch, name, threads, f"{rate:.0f}", f"{rate / needed:.1f}")
    print("\nFor the results page's 50 epochs of 7,908 images within 15 minutes, 440 images/s are the least.")


def main() -> None:
    """Prints a Markdown table."""
    options = options_of(
        __doc__,
        2,
        batches={"type": int, "nargs": "+", "help": "images a step"},
        loader_threads={"type": int, "nargs": "+", "help": "for a GPU"},
    )
    on_gpu = options.device.type == "cuda"
    options.loader_threads = options.loader_threads or [
        n for n in (1, 4, 16) if n == 1 or (on_gpu and n <= options.threads)
    ]
    options.batches = options.batches or ([1, 10, 32] if on_gpu else [1, 4])
    with split_of(options) as cache:
        compare(options, cache)


if __name__ == "__main__":
    main()
