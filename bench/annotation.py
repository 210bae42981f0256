"""What masks are worth: one configuration trained with several numbers of masks, each with several seeds.

    python -m bench.annotation DATA --rows FILE.csv [--figure FILE.png] [--counts 8 16 32 64 132] [--seeds 3]

A seed draws the network, the order of the images and which images keep their masks, so the intervals hold all that
luck but that of the test images. Epoch and thresholds come from validation; the test split is evaluated once a training
and nothing is chosen on it. Each training adds a row to FILE.csv as it ends, and one whose row is there is not run
again. One thread. Prints a Markdown table, with intervals of the means over seeds (Student's t; all numbers of masks
share one spread), then what tuner/masks.py makes of the means: the most masks predicted from the fewer ones, and the
next ones. A training that has found nothing at its end, on validation, is counted and left out of the means.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from model import layouts, splits, train
from model.config import RunConfig
from model.data import open_cache
from model.evaluate import score
from model.splits import Splits
from tuner import masks
from tuner.masks import Curve, Point
from tuner.report import style

FIGURES = ("dice_positive_mean", "dice_mean", "decision_ap")
OF_SPLITS = tuple(f"{split}_{name}" for split in ("validation", "test") for name in FIGURES)
NOTHING = 0.05
"""validation Dice of positives below which a training has found nothing"""
COLUMNS = ("masks", "seed", "best_epoch", *OF_SPLITS, "seconds")


def train_one(found: Splits, count: int, seed: int, epochs: int, side: int) -> dict[str, float]:
    """A row of the file."""
    cpu = torch.device("cpu")
    config = RunConfig(
        width=0.25, input_height=side, input_width=side, epochs=epochs, learning_rate=0.5, augment_flips=True,
        threshold_rule="grid", num_segmented=count, seed=seed,
    )  # fmt: skip
    began = time.perf_counter()
    validation, test = (open_cache(split, side, side) for split in (found.validation, found.test))
    training = train.start(config, cpu)
    best: dict[str, float | None] = {}
    for _ in train.fit(training, open_cache(splits.keep_masks(found.train, count, seed), side, side)):
        scores = score(training.network, validation, config, cpu)
        thresholds = scores.choose(config.judgement())
        figures = scores.figures([thresholds])[0]
        if not best or (figures["dice_positive_mean"] or 0.0) > (best["dice_positive_mean"] or 0.0):
            best, best_epoch, chosen = figures, training.epochs_done, thresholds
            weights = copy.deepcopy(training.network.state_dict())
    training.network.load_state_dict(weights)
    tested = score(training.network, test, config, cpu).figures([chosen])[0]
    row = {"masks": count, "seed": seed, "best_epoch": best_epoch, "seconds": time.perf_counter() - began}
    for split, of_split in (("validation", best), ("test", tested)):
        row |= {f"{split}_{name}": of_split[name] or 0.0 for name in FIGURES}
    return row


def read_rows(file: Path) -> list[dict[str, float]]:
    """The rows that are there."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]


def found_something(row: dict[str, float]) -> bool:
    """Whether a training has begun to segment."""
    return row["validation_dice_positive_mean"] >= NOTHING


class Means:
    """Of a figure of the test split, by the number of masks."""

    def __init__(self, rows: list[dict[str, float]], name: str) -> None:
        self.of_seeds: dict[int, list[float]] = {}
        for row in sorted(filter(found_something, rows), key=lambda row: row["masks"]):
            self.of_seeds.setdefault(int(row["masks"]), []).append(row[f"test_{name}"])
        self.masks = list(self.of_seeds)
        counts = np.array([len(values) for values in self.of_seeds.values()])
        freedom = int((counts - 1).sum())
        self.variance = sum(np.var(values) * len(values) for values in self.of_seeds.values()) / freedom
        self.means = [float(np.mean(values)) for values in self.of_seeds.values()]
        self.variances = self.variance / counts
        self.half = stats.t.ppf(0.975, freedom) * np.sqrt(self.variances)

    def curve(self, most: int) -> Curve:
        """The annotation curve through those with at most so many masks."""
        known = [n for n in self.masks if n <= most]
        points = [Point(n, mean, 1, 1) for n, mean in zip(known, self.means, strict=False)]
        return masks.through(points, self.variances[: len(known)])


def table(rows: list[dict[str, float]]) -> None:
    """Prints the measured."""
    found = [Means(rows, name) for name in FIGURES]
    print("| masks | seeds | found nothing | test Dice, positives | test Dice, all | decision AP | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for place, n in enumerate(found[0].masks):
        shown = " | ".join(f"{one.means[place]:.3f} ± {one.half[place]:.3f}" for one in found)
        mine = [row for row in rows if row["masks"] == n]
        minutes = np.mean([row["seconds"] for row in mine]) / 60
        print(f"| {n} | {len(mine)} | {len(mine) - len(found[0].of_seeds[n])} | {shown} | {minutes:.1f} |")
    spreads = ", ".join(f"{np.sqrt(one.variance):.3f}" for one in found)
    print(f"\nStandard deviation of one training, by seed: {spreads}.")


def told(dice: Means) -> None:
    """Prints what the curve says."""
    *_, before, most = dice.masks
    early, curve = dice.curve(before), dice.curve(most)
    middle, low, high = early.value(most)
    predicted = f"\nFrom {dice.masks[0]} to {before} masks the curve predicts {middle:.3f} ({low:.3f} to {high:.3f})"
    print(f"{predicted} for {most}; measured: {dice.means[-1]:.3f} ± {dice.half[-1]:.3f}.")
    gain, low, high = curve.gain(most, most + masks.STEP)
    print(f"The next {masks.STEP} masks would bring {gain:.3f} ({low:.3f} to {high:.3f}).")


def draw(dice: Means, file: Path) -> None:
    """The annotation curve as a figure."""
    *_, before, most = dice.masks
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        places = np.geomspace(dice.masks[0], most + masks.STEP, 60)
        for curve, colour, label in (
            (dice.curve(most), style.INK, f"curve through all, to {most}"),
            (dice.curve(before), style.ORANGE, f"curve through those to {before}"),
        ):
            middle, low, high = np.array([curve.value(n) for n in places]).T
            if colour == style.INK:
                axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
            else:
                axes.plot(places, low, ":", places, high, ":", color=colour, linewidth=1)
            axes.plot(places, middle, "-" if colour == style.INK else "--", color=colour, label=label)
        for n, values in dice.of_seeds.items():
            axes.plot([n] * len(values), values, "o", color=style.SKY, markersize=3.5,
                      label="a training" if n == most else None)  # fmt: skip
        axes.errorbar(dice.masks, dice.means, dice.half, fmt="o", color=style.BLUE, elinewidth=1.2, capsize=2.5,
                      label="mean of seeds, 95 %")  # fmt: skip
        axes.set(xlabel="images with masks", ylabel="test Dice of positive images")
        style.legend(axes, columns=2)
        figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    """Trains what is missing, then prints and draws all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 16, 32, 64, 132])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--side", type=int, default=128, help="px")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, or nothing is known of luck, found {options.seeds}")
    torch.set_num_threads(1)
    found = splits.assign(layouts.read(options.data), options.data, 0.2, 0.2, seed=0)
    there = {(row["masks"], row["seed"]) for row in read_rows(options.rows)}
    for seed in range(options.seeds):
        for count in options.counts:
            if (count, seed) in there:
                continue
            row = train_one(found, count, seed, options.epochs, options.side)
            is_new = not options.rows.exists()
            with options.rows.open("a", newline="") as lines:
                writer = csv.DictWriter(lines, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
    rows = read_rows(options.rows)
    table(rows)
    dice = Means(rows, FIGURES[0])
    told(dice)
    if options.figure:
        draw(dice, options.figure)


if __name__ == "__main__":
    main()
