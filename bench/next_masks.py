"""Whether the masks that `tuner next` asks for are worth more than others.

    python -m bench.next_masks DATA [--masks 16] [--epochs 16] [--repeats 4] [--side 128]

A network learns from few masks. Of the positives that have none in training it is asked which should get one: by the
ranking of `tuner next`, by the px that it expects to be wrong without dividing by those of the defect, by the plain
mean entropy of its probabilities, and at random; each choice is trained anew, from the same seed. Each repeat has other
first masks, another seed and another random choice. Images without masks are left out of training: the decision's loss
does not reach the segmentation network (`gradient_adjustment`), and they cost time.

Prints Markdown: how each ranking goes with the Dice that the network truly lacks on the images (their masks are there,
and hidden from it); and test Dice of positives, at thresholds and epochs chosen on validation. Nothing is chosen on
test.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from model import layouts, splits, tiles, train
from model.arrays import Array
from model.config import RunConfig
from model.data import Cache, open_cache
from model.duplicates import different_first
from model.evaluate import score
from model.export import Deployable
from model.inspection import decode_image, decode_mask, perceptual_hash
from model.network import SegDecNet
from model.sample import Sample, Supervision
from model.thresholds import Thresholds
from model.uncertainty import look, usual_share

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Trained = tuple[SegDecNet, Thresholds]


def main() -> None:
    """Trains, asks, trains anew, and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--masks", type=int, default=16, help="at first, and so many again")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="px")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = splits.assign(layouts.read(options.data), options.data, 0.2, 0.2, seed=0)
    validation, test = (open_cache(split, options.side, options.side) for split in (found.validation, found.test))
    results: dict[str, list[float]] = {}
    print(
        "| repeat | masks | chosen by | test Dice, positives | Spearman with Dice lacking | of chosen | of ours | s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for repeat in range(options.repeats):
        config = RunConfig(
            width=0.25, input_height=options.side, input_width=options.side, epochs=options.epochs, learning_rate=0.5,
            augment_flips=True, threshold_rule="grid", seed=repeat,
        )  # fmt: skip
        first = splits.keep_masks(found.train, options.masks, seed=repeat)
        pool = [sample for sample in first if sample.supervision is Supervision.IMAGE]

        def told(chosen: list[Sample], name: str, *more: str, repeat: int = repeat, first: list[Sample] = first,
                 config: RunConfig = config) -> Trained:  # fmt: skip
            began = time.perf_counter()
            trained = fitted(with_masks(first, chosen), validation, config)
            dice = test_dice(trained, test, config)
            results.setdefault(name, []).append(dice)
            shown = (repeat, options.masks + len(chosen), name, f"{dice:.4f}", *more)
            print(f"| {' | '.join(map(str, shown))} | {time.perf_counter() - began:.0f} |", flush=True)
            return trained

        network, thresholds = told([], "(first masks)", "", "", "")
        values, lacking = asked(network, thresholds, pool, options.side)
        hashes = np.stack([perceptual_hash(decode_image(sample.image)) for sample in pool])
        groups = [sample.group for sample in pool]
        ours = [row for row, _ in different_first(values["tuner next"], groups, hashes)]
        orders = {
            "tuner next": ours,
            **{name: np.argsort(-np.array(values[name]), kind="stable").tolist() for name in ("wrong px", "entropy")},
            "random": np.random.default_rng(repeat).permutation(len(pool)).tolist(),
        }
        for name, order in orders.items():
            chosen = order[: options.masks]
            fit = f"{spearmanr(values[name], lacking).statistic:.2f}" if name in values else ""
            lack = f"{np.mean([lacking[row] for row in chosen]):.3f}"
            told([pool[row] for row in chosen], name, fit, lack, str(len({*chosen} & {*ours[: options.masks]})))
    print("\n| chosen by | mean test Dice | less random, mean | standard error of it |\n| --- | --- | --- | --- |")
    for name, dices in results.items():
        apart = np.array(dices) - np.array(results["random"])
        print(f"| {name} | {np.mean(dices):.4f} | {apart.mean():+.4f} | {apart.std(ddof=1) / len(apart) ** 0.5:.4f} |")


def with_masks(first: list[Sample], chosen: list[Sample]) -> list[Sample]:
    """Negatives, and the positives that have a mask."""
    names = {sample.name for sample in chosen}
    given = [replace(s, supervision=Supervision.PIXEL) if s.name in names else s for s in first]
    return [sample for sample in given if sample.supervision is Supervision.PIXEL]


def fitted(samples: list[Sample], validation: Cache, config: RunConfig) -> Trained:
    """At the epoch that is best on validation."""
    training = train.start(config, DEVICE)
    cache = open_cache(samples, config.input_height, config.input_width)
    best = -1.0
    for _ in train.fit(training, cache):
        if training.epochs_done % 2 and training.epochs_done < config.epochs:
            continue  # looking costs as much as training
        scores = score(training.network, validation, config, DEVICE)
        thresholds = scores.choose(config.judgement())
        value = scores.figures([thresholds])[0]["dice_positive_mean"] or 0.0
        if value > best:
            best, kept = value, (copy.deepcopy(training.network), thresholds)
    return kept


def test_dice(trained: Trained, test: Cache, config: RunConfig) -> float:
    """Of positives."""
    network, thresholds = trained
    return score(network, test, config, DEVICE).figures([thresholds])[0]["dice_positive_mean"] or 0.0


def asked(
    network: SegDecNet, thresholds: Thresholds, pool: list[Sample], side: int
) -> tuple[dict[str, list[float]], list[float]]:
    """What each ranking says of each image, and the Dice that the network lacks there."""
    answer = Deployable(network, thresholds).to(DEVICE).answer
    sizes = tiles.Sizes.of((side, side), {"height": 448, "width": 448, "largest_height": 448, "largest_width": 448})
    images = [decode_image(sample.image) for sample in pool]
    found = [look(image_HWC, answer, sizes, thresholds, label=True)[0] for image_HWC in images]
    usual = usual_share(found)
    values = {
        "tuner next": [one.score(usual) for one in found],
        "wrong px": [one.doubt + one.disagreement + one.contradiction(usual) for one in found],
        "entropy": [entropy(tiles.probability(image_HWC, answer, sizes)[0]) for image_HWC in images],
    }
    lacking = []
    for sample, image_HWC in zip(pool, images, strict=True):
        assert sample.mask is not None
        lacking.append(1 - tiles.dice(decode_mask(sample.mask), tiles.segment(image_HWC, answer, sizes).mask_HW))
    return values, lacking


def entropy(probability_HW: Array) -> float:
    """Mean over px, nats."""
    p = np.clip(probability_HW.astype(np.float64), 1e-12, 1 - 1e-12)
    return float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())


if __name__ == "__main__":
    main()
