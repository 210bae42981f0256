"""What masks are worth: one configuration trained with several numbers of masks, each with several seeds.

    python -m bench.annotation DATA --rows FILE.csv [--figure FILE.png] [--counts 8 16 32 64 132] [--seeds 3]

A seed draws the network, the order of the images and which images keep their masks, so the intervals hold all that
luck. Epoch and thresholds come from validation; the test split is evaluated once a training and nothing is chosen on
it. Each training adds a row to FILE.csv as it ends, and one whose row is there is not run again. One thread.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import torch

from model import layouts, splits, train
from model.config import RunConfig
from model.data import open_cache
from model.evaluate import score
from model.splits import Splits

FIGURES = ("dice_positive_mean", "dice_mean", "decision_ap")
OF_SPLITS = tuple(f"{split}_{name}" for split in ("validation", "test") for name in FIGURES)
COLUMNS = ("masks", "seed", "best_epoch", *OF_SPLITS, "seconds")


def train_one(found: Splits, masks: int, seed: int, epochs: int, side: int) -> dict[str, float]:
    """A row of the file."""
    cpu = torch.device("cpu")
    config = RunConfig(
        width=0.25, input_height=side, input_width=side, epochs=epochs, learning_rate=0.5, augment_flips=True,
        threshold_rule="grid", num_segmented=masks, seed=seed,
    )  # fmt: skip
    began = time.perf_counter()
    validation, test = (open_cache(split, side, side) for split in (found.validation, found.test))
    training = train.start(config, cpu)
    best: dict[str, float | None] = {}
    for _ in train.fit(training, open_cache(splits.keep_masks(found.train, masks, seed), side, side)):
        scores = score(training.network, validation, config, cpu)
        thresholds = scores.choose(config.judgement())
        figures = scores.figures([thresholds])[0]
        if not best or (figures["dice_positive_mean"] or 0.0) > (best["dice_positive_mean"] or 0.0):
            best, best_epoch, chosen = figures, training.epochs_done, thresholds
            weights = copy.deepcopy(training.network.state_dict())
    training.network.load_state_dict(weights)
    tested = score(training.network, test, config, cpu).figures([chosen])[0]
    row = {"masks": masks, "seed": seed, "best_epoch": best_epoch, "seconds": time.perf_counter() - began}
    for split, of_split in (("validation", best), ("test", tested)):
        row |= {f"{split}_{name}": of_split[name] or 0.0 for name in FIGURES}
    return row


def read_rows(file: Path) -> list[dict[str, float]]:
    """The rows that are there."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 16, 32, 64, 132])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--side", type=int, default=128, help="px")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = splits.assign(layouts.read(options.data), options.data, 0.2, 0.2, seed=0)
    there = {(row["masks"], row["seed"]) for row in read_rows(options.rows)}
    for seed in range(options.seeds):
        for masks in options.counts:
            if (masks, seed) in there:
                continue
            row = train_one(found, masks, seed, options.epochs, options.side)
            is_new = not options.rows.exists()
            with options.rows.open("a", newline="") as lines:
                writer = csv.DictWriter(lines, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
