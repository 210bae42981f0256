"""The loader alone, by augmentation, batch and threads, against what training takes.

    python -m bench.loader [--batches 1 10 32] [--loader-threads 1 4 16] [--seconds 2] [--device cpu]

Images lie decoded in memory, as after a trial's first epoch; batches arrive whole on the device and are thrown away.
Training is measured on the same split in the same run, without augmentation. On a CPU both want the same cores, so a
loader that is so many times as fast takes one part in so many of the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch

from bench.measure import Table, config_of, now, options_of, repeated, split_of
from bench.training_step import Fast, epoch_rate, fitting
from model import data
from model.config import RunConfig
from model.data import Cache
from model.sample import Batch

AUGMENTATIONS = {
    "none": {},
    "flips": {"augment_flips": True},
    "all": {
        "augment_flips": True,
        "augment_quarter_turns": True,
        "augment_brightness": 0.2,
        "augment_color": 0.1,
    },
}


def batches(cache: Cache, config: RunConfig, device: torch.device, threads: int) -> Iterator[Batch]:
    """An epoch's, as training has them."""
    assert threads == 1, "the loader has one thread"
    return data.batches(cache, config, 0, device)


def loaded(cache: Cache, config: RunConfig, device: torch.device, threads: int, seconds: float) -> float:
    """Images a second over whole epochs, after a few batches to warm up."""
    for _, _batch in zip(range(3), batches(cache, config, device, threads), strict=False):
        pass
    began, done = now(device), 0
    while True:
        for batch in batches(cache, config, device, threads):
            done += len(batch.rows)
            if time.perf_counter() - began > seconds:
                return done / (now(device) - began)


def compare(options: argparse.Namespace, cache: Cache) -> None:
    """One table."""
    print(f"{options.height}x{options.width} px, width {options.width_factor:g}\n")
    shown = Table("batch", "augmentation", "threads", "images/s", "times what training takes")
    left_out = {}
    for batch in options.batches:
        config = config_of(options, batch_size=batch)
        fast = Fast(config, options.device)
        needed = epoch_rate(fast, fitting(fast, cache, options.device, options.seconds), options.device)
        shown.add(batch, "(training)", "", f"{needed:.1f}", "1.0")
        split = repeated(cache, max(1024, 8 * batch))
        for name, fields in AUGMENTATIONS.items():
            if "augment_quarter_turns" in fields and options.height != options.width:
                fields = fields | {"augment_quarter_turns": False}
            augmented = config_of(options, batch_size=batch, **fields)
            for threads in options.loader_threads:
                try:
                    rate = loaded(split, augmented, options.device, threads, options.seconds)
                except ImportError as error:
                    left_out[name] = str(error)
                    continue
                shown.add(batch, name, threads, f"{rate:.0f}", f"{rate / needed:.1f}")
    for name, why in left_out.items():
        print(f"\nAugmentation '{name}' was left out: {why}.")
    print("\nFor the results page's 50 epochs of 7,908 images within 15 minutes, 440 images/s are the least.")


def main() -> None:
    """Prints a Markdown table."""
    options = options_of(
        __doc__,
        2,
        batches={"type": int, "nargs": "+", "help": "images a step"},
        loader_threads={"type": int, "nargs": "+", "default": [1]},
    )
    options.batches = options.batches or ([1, 10, 32] if options.device.type == "cuda" else [1, 4])
    with split_of(options) as cache:
        compare(options, cache)


if __name__ == "__main__":
    main()
