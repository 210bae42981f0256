"""What masks are worth: one configuration trained with all masks, half of them and a tenth, on the same budget.

    python -m bench.num_segmented DATA [--epochs 12] [--side 224]

Prints a Markdown table: test figures at the thresholds found on validation. Trainings run one after another, in one
process, from one seed; the test split is evaluated once for each row and nothing is chosen on it.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

from model import layouts, splits, train
from model.config import RunConfig
from model.data import open_cache
from model.evaluate import score


def main() -> None:
    """Trains and prints a row for each count of masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--side", type=int, default=224, help="px")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = splits.assign(layouts.read(options.data), options.data, 0.2, 0.2, seed=0)
    masks = splits.counts(found.train)["segmented"]
    validation, test = (open_cache(split, options.side, options.side) for split in (found.validation, found.test))
    print("| masks | best epoch | test Dice, positives | test Dice, all | decision AP | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in (masks, masks // 2, masks // 10):
        config = RunConfig(
            width=0.25, input_height=options.side, input_width=options.side, epochs=options.epochs, learning_rate=0.5,
            augment_flips=True, threshold_rule="grid", num_segmented=count,
        )  # fmt: skip
        cache = open_cache(splits.keep_masks(found.train, count), options.side, options.side)
        training = train.start(config, device)
        began = time.perf_counter()
        best_value, best_epoch = -1.0, 0
        for _ in train.fit(training, cache):
            scores = score(training.network, validation, config, device)
            thresholds = scores.choose(config.judgement())
            value = scores.figures([thresholds])[0]["dice_positive_mean"] or 0.0
            if value > best_value:
                best_value, best_epoch, chosen = value, training.epochs_done, thresholds
                weights = copy.deepcopy(training.network.state_dict())
        minutes = (time.perf_counter() - began) / 60
        training.network.load_state_dict(weights)
        figures = score(training.network, test, config, device).figures([chosen])[0]
        shown = " | ".join(f"{figures[key]:.4f}" for key in ("dice_positive_mean", "dice_mean", "decision_ap"))
        print(f"| {count} of {masks} | {best_epoch} | {shown} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
