"""The whole schedule of the results page, measured in part and extrapolated.

    python -m bench.schedule [--batches 1 10 32] [--seconds 10] [--validation 1695] [--device cpu --height 128 ...]

50 epochs of 7,908 images of 448x448 px and 11 validations of 1,695 images, judged by every threshold rule, with the
full network. Training and the forward pass over validation images are set against what matrix products in bfloat16
reach on the same machine in the same run (bench/limits.py).
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from bench import limits
from bench.limits import Limits
from bench.measure import MIB, Table, config_of, options_of, repeated, seconds_of, split_of, table
from bench.plain import images_in, operations
from bench.training_step import Fast, epoch_rate, fitting
from model.config import RunConfig
from model.data import Cache
from model.evaluate import Scores, predict, score

EPOCHS, IMAGES, VALIDATIONS, VALIDATION_IMAGES = 50, 7908, 11, 1695
RULES = ("min_of_max", 1), ("pr_curve", 1), ("pr_curve", 10), ("grid", 1)
"""All rules, that of the curve also on every tenth pixel: the largest factor in search_spaces/."""


class Validation(NamedTuple):
    """Seconds of one, of all images of the schedule."""

    forward: float
    counts: float
    """the pass over the split beyond its forward pass"""
    choice: float
    """of thresholds, and the figures at them"""

    @property
    def beyond(self) -> float:
        return self.counts + self.choice


def validation(fast: Fast, split: Cache, config: RunConfig, device: torch.device) -> Validation:
    """As after an epoch of a trial. The forward pass is `model.evaluate.predict` alone, its answers thrown away, once
    before and once after; the shorter one counts."""
    network = fast.training.network
    factors = tuple({factor for _, factor in RULES})

    def forward() -> None:
        for _ in predict(network, split.images, config, device):
            pass

    few = repeated(split, min(64, len(split.samples)))
    score(network, few, config, device, factors)  # to warm up
    once = seconds_of(forward, device)
    found: list[Scores] = []
    whole = seconds_of(lambda: found.append(score(network, split, config, device, factors)), device)
    once = min(once, seconds_of(forward, device))
    judgement = config.judgement()
    judgements = [judgement._replace(threshold_rule=rule, threshold_factor=factor) for rule, factor in RULES]
    choice = seconds_of(lambda: found[0].figures([found[0].choose(one) for one in judgements]), device)
    share = VALIDATION_IMAGES / len(split.samples)
    return Validation(once * share, (whole - once) * share, choice * share)


def schedule(options: argparse.Namespace, cache: Cache, limits_here: Limits) -> None:
    """Prints the tables."""
    config = config_of(options)
    forward, of_image = operations(config)
    head = "batch", "images measured", "images/s", "TFLOP/s", "share of the product peak", "torch held at its peak, MiB"
    shown = Table(*head, "all training, min")
    training: dict[int, float] = {}
    for batch in options.batches:
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        fast = Fast(config_of(options, batch_size=batch), options.device)
        part = fitting(fast, cache, options.device, options.seconds / 2)
        fast.epoch(part)
        rate = epoch_rate(fast, part, options.device)
        held = torch.cuda.max_memory_reserved() // MIB if options.device.type == "cuda" else ""
        training[batch] = EPOCHS * IMAGES / rate
        tera = rate * of_image / 1e12
        shown.add(batch, images_in(part, config), f"{rate:.1f}", f"{tera:.2f}", f"{tera / limits_here.bfloat16:.1%}",
                  held, f"{training[batch] / 60:.1f}")  # fmt: skip
    split = repeated(cache, options.validation)
    found = validation(fast, split, config, options.device)
    tera = VALIDATION_IMAGES / found.forward * forward / 1e12
    print()
    table(
        (f"a validation of {VALIDATION_IMAGES:,} images", "s", "share of the product peak"),
        ("forward pass", f"{found.forward:.2f}", f"{tera / limits_here.bfloat16:.1%}"),
        ("counting, beyond it", f"{found.counts:.2f}", ""),
        ("choosing thresholds, figures", f"{found.choice:.2f}", ""),
        ("all beyond the forward pass", f"{found.beyond:.2f}", ""),
    )
    print()
    validations = VALIDATIONS * (found.forward + found.beyond)
    table(
        ("batch", "training, min", "validations, min", "whole schedule, min"),
        *((batch, f"{seconds / 60:.1f}", f"{validations / 60:.1f}", f"{(seconds + validations) / 60:.1f}")
          for batch, seconds in training.items()),
    )  # fmt: skip
    print(
        f"\nAssumed: every image takes as long as those measured (the second epoch of so many, after shorter ones to "
        f"warm up; {options.height}x{options.width} px, width {options.width_factor:g}, {of_image / 1e9:.3g} GFLOP an "
        f"image), the images are decoded and in memory ({len(cache.samples)} distinct ones, over and over), no "
        f"augmentation, and nothing between epochs but validation: no checkpoints, previews or logging. One validation "
        f"of {len(split.samples)} images was measured and counts 11 times"
        + ("." if len(split.samples) == VALIDATION_IMAGES else ", all its parts scaled up to 1,695 images.")
        + f" {EPOCHS} epochs of {IMAGES:,} images, {VALIDATIONS} validations."
    )


def main() -> None:
    """Prints Markdown tables."""
    options = options_of(
        __doc__,
        10,
        batches={"type": int, "nargs": "+", "default": [1, 10, 32], "help": "images a step"},
        validation={"type": int, "default": VALIDATION_IMAGES, "help": "images of the one that is measured"},
    )
    found = limits.measure(options.device, min(1.5, options.seconds))
    limits.show(found, options)
    print()
    with split_of(options) as cache:
        schedule(options, cache, found)


if __name__ == "__main__":
    main()
