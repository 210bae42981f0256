"""Training as `tuner search` does it against the plain loop of bench/plain.py, in turn: images a second, loss curves.

    python -m bench.training_step [--batches 1 4] [--rounds 3] [--seconds 5] [--device cpu] [--height 448] [--width 448]

1. Whole epochs over a split in memory, loading included, of about `--seconds` each: both ways are measured one after
   the other in each round; medians over the rounds. Operations are those of the network's convolutions and products;
   their share is of what matrix products in bfloat16 reach on this machine in this run (bench/limits.py). Plain runs
   with torch's defaults, so on a GPU its convolutions round float32 to TF32.
2. Both ways from the same weights on the same images in the same order, smaller and narrower: the largest difference of
   the epochs' mean losses, relative to the plain one's. In bfloat16, and in float32, where rounding alone is left.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench import limits
from bench.measure import Table, config_of, options_of, repeated, seconds_of, split_of
from bench.plain import Plain, images_in, operations
from model import train
from model.config import RunConfig
from model.data import Cache

_MOST_IMAGES = 8192


class Fast:
    """What trials do."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.training = config, train.start(config, device)

    def epoch(self, cache: Cache) -> float:
        """The next one; the mean total loss."""
        return train.train_epoch(self.training, cache)["loss_total"]


def epoch_rate(one: Fast | Plain, split: Cache, device: torch.device) -> float:
    """Images a second of an epoch."""
    return images_in(split, one.config) / seconds_of(lambda: one.epoch(split), device)


def fitting(one: Fast | Plain, cache: Cache, device: torch.device, seconds: float) -> Cache:
    """A split of whole batches whose epoch takes about so many seconds. Shorter epochs warm up before."""
    least = max(one.config.batch_size, 2)
    split = repeated(cache, least)
    one.epoch(split)
    while True:  # a short epoch says little of a long one, least where it was held up
        count = len(split.samples)
        rate = epoch_rate(one, split, device)
        if count / rate < seconds / 4:
            rate = max(rate, epoch_rate(one, split, device))
        wanted = max(least, min(round(rate * seconds), _MOST_IMAGES) // least * least)
        if wanted <= 8 * count:
            return repeated(cache, wanted)
        split = repeated(cache, 8 * count)


def speeds(options: argparse.Namespace, cache: Cache) -> None:
    """The first part. The peak is measured in each round too, for other work may share the machine."""
    _, of_image = operations(config_of(options))
    print(f"{of_image / 1e9:.3g} GFLOP an image forward and backward; {options.height}x{options.width} px, "
          f"width {options.width_factor:g}, {options.rounds} rounds\n")  # fmt: skip
    speeds_of = "images an epoch", "images/s", "from, to", "times plain"
    shown = Table("batch", "way", *speeds_of, "TFLOP/s", "share of the product peak")
    for batch in options.batches:
        config = config_of(options, batch_size=batch)
        ways: dict[str, Fast | Plain] = {
            "plain": Plain(config, options.device),
            "fast": Fast(config, options.device),
        }
        splits = {name: fitting(one, cache, options.device, options.seconds) for name, one in ways.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        peaks = []
        for _ in range(options.rounds):
            peaks.append(limits.products(options.device, torch.bfloat16, None, min(0.3, options.seconds)))
            for name, one in ways.items():
                found[name].append(epoch_rate(one, splits[name], options.device))
        plain = statistics.median(found["plain"])
        for name, rates in found.items():
            rate = statistics.median(rates)
            tera = rate * of_image / 1e12
            speed = f"{rate:.2f}", f"{min(rates):.2f}, {max(rates):.2f}", f"{rate / plain:.2f}"
            share = f"{tera / statistics.median(peaks):.1%}"
            shown.add(batch, name, len(splits[name].samples), *speed, f"{tera:.2f}", share)


def curves(options: argparse.Namespace, cache: Cache) -> None:
    """The second part."""
    epochs = 10
    split = repeated(cache, -(-options.steps // epochs))
    base = config_of(options, epochs=epochs, batch_size=1)
    ways: dict[str, Callable[[], Fast | Plain]] = {
        "plain": lambda: Plain(base, options.device),
        "fast": lambda: Fast(base, options.device),
        "fast, float32": lambda: Fast(replace(base, precision="float32"), options.device),
    }
    print(f"\n{images_in(split, base) * epochs} steps of one image, {epochs} epochs, {options.height}x{options.width} "
          f"px, width {options.width_factor:g}, learning rate {base.learning_rate:g}\n")  # fmt: skip
    shown = Table("way", "loss of the first epoch", "of the last", "largest difference")
    plain: list[float] = []
    for name, make in ways.items():
        losses = list(_losses(make(), split, epochs))
        plain = plain or losses
        apart = max(abs(mine / theirs - 1) for mine, theirs in zip(losses, plain, strict=True))
        shown.add(name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{apart:.1e}" if losses is not plain else "")


def _losses(one: Fast | Plain, cache: Cache, epochs: int) -> Iterator[float]:
    for _ in range(epochs):
        yield one.epoch(cache)
        if isinstance(one, Fast):
            one.training.epochs_done += 1
        else:
            one.epochs_done += 1


def main() -> None:
    """Prints Markdown tables."""
    options = options_of(
        __doc__,
        5,
        batches={"type": int, "nargs": "+", "help": "images a step"},
        rounds={"type": int, "default": 3},
        steps={"type": int, "default": 300, "help": "of the loss curves"},
    )
    options.batches = options.batches or ([1, 4, 10, 32] if options.device.type == "cuda" else [1, 4])
    limits.show(limits.measure(options.device, min(2, options.seconds)), options)
    print()
    with split_of(options) as cache:
        speeds(options, cache)
    options.height, options.width = (min(side, 128) for side in (options.height, options.width))
    options.width_factor = min(options.width_factor, 0.25)
    with split_of(options) as cache:
        curves(options, cache)


if __name__ == "__main__":
    main()
