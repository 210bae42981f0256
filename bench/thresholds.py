"""Count tables against the straightforward search: thresholds x images x full-image arithmetic.

    python -m bench.thresholds

Both answer the same question on the same half-precision probabilities, in one process and one run, and must agree. The
straightforward side comes twice: each figure by its own expression over whole images, as metric functions are usually
written, and with the sums that they share computed once. Then: what a validation costs beyond the forward pass, and how
memory grows with the number of images. Maps are smooth noise around drawn cracks, with as many distinct scores as those
of a trained network (printed).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch

from bench.memory import own_mib
from model import metrics, thresholds
from model.config import Judgement
from model.counts import CountsBuilder, spread, tally, to_half
from model.evaluate import Scores
from model.thresholds import sigmoid

GRID = np.arange(1, 200) / 200
_RULES = (("min_of_max", 1), ("pr_curve", 1), ("pr_curve", 10), ("grid", 1))


def images(count: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Truth, uint8, and logits, float32, of one image after another; every eighth has no crack."""
    rng = np.random.default_rng(0)
    for n in range(count):
        truth = np.zeros((side, side), np.uint8)
        if n % 8:
            points = np.cumsum(rng.normal(0, side / 12, (12, 2)), axis=0) + rng.uniform(0, side, 2)
            cv2.polylines(truth, [points.astype(np.int32)], False, 1, int(rng.integers(1, 6)))
        noise = cv2.GaussianBlur(rng.standard_normal((side, side), np.float32), (0, 0), 2) * 4
        yield truth, cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 2) * 12 - 5 + noise


def figure_by_figure(truth_NHW: np.ndarray, probability_NHW: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, IoU, precision and recall, each by its own expression."""
    expressions: dict[str, Callable[[Any, Any], float]] = {
        "dice_mean": lambda t, m: (2 * (t & m).sum() + 1e-15) / (t.sum() + m.sum() + 1e-15),
        "iou_mean": lambda t, m: ((t & m).sum() + 1e-15) / ((t | m).sum() + 1e-15),
        "precision_mean": lambda t, m: ((t & m).sum() + 1e-15) / (m.sum() + 1e-15),
        "recall_mean": lambda t, m: ((t & m).sum() + 1e-15) / (t.sum() + 1e-15),
    }
    found = {name: np.zeros(len(GRID)) for name in expressions}
    for k, threshold in enumerate(GRID):
        for truth, probability in zip(truth_NHW, probability_NHW, strict=True):
            mask = probability > threshold
            for name, expression in expressions.items():
                found[name][k] += expression(truth, mask) / len(truth_NHW)
    return found


def shared_sums(truth_NHW: np.ndarray, probability_NHW: np.ndarray) -> dict[str, np.ndarray]:
    """The same four from two sums a mask."""
    found = {name: np.zeros(len(GRID)) for name in ("dice_mean", "iou_mean", "precision_mean", "recall_mean")}
    for truth, probability in zip(truth_NHW, probability_NHW, strict=True):
        wanted = np.count_nonzero(truth)
        for k, threshold in enumerate(GRID):
            mask = probability > threshold
            hits, predicted = np.count_nonzero(truth & mask), np.count_nonzero(mask)
            found["dice_mean"][k] += (2 * hits + 1e-15) / (wanted + predicted + 1e-15)
            found["iou_mean"][k] += (hits + 1e-15) / (wanted + predicted - hits + 1e-15)
            found["precision_mean"][k] += (hits + 1e-15) / (predicted + 1e-15)
            found["recall_mean"][k] += (hits + 1e-15) / (wanted + 1e-15)
    return {name: values / len(truth_NHW) for name, values in found.items()}


def two_pixel(truth_NHW: np.ndarray, probability_NHW: np.ndarray) -> np.ndarray:
    """The public code's 2-pixel F1; the truth is grown once an image."""
    total = np.zeros(len(GRID))
    for truth, probability in zip(truth_NHW, probability_NHW, strict=True):
        grown = spread(np, truth.astype(np.uint8), 2).astype(bool)
        for k, threshold in enumerate(GRID):
            mask = probability > threshold
            hits, false_alarms, misses = (mask & grown).sum(), (mask & ~grown).sum(), (~mask & truth).sum()
            precision, recall = hits / max(hits + false_alarms, 1), hits / max(hits + misses, 1)
            total[k] += 2 * precision * recall / max(precision + recall, 1e-15)
    return total / len(truth_NHW)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the answer; the best of three where it is quick."""
    best, answer = np.inf, None
    for _ in range(3):
        began = time.perf_counter()
        answer = function()
        best = min(best, time.perf_counter() - began)
        if best > 2:
            break
    return best, answer


def compare(count: int, side: int) -> None:
    """One pass against the straightforward ways."""
    pairs = list(images(count, side))
    truth = np.array([pair[0] for pair in pairs], bool)
    probability = np.array([sigmoid(pair[1]) for pair in pairs]).astype(np.float16)
    print(f"\n{count} images of {side}x{side}, {len(GRID)} thresholds, float16 probabilities\n")
    print("| figures | way | s | ratio |")
    print("| --- | --- | --- | --- |")
    one, swept = timed(lambda: thresholds.sweep(truth, probability, GRID))
    print(f"| Dice, IoU, precision, recall | one pass | {one:.2f} | 1 |", flush=True)
    for name, way in (("a figure at a time", figure_by_figure), ("shared sums", shared_sums)):
        seconds, found = timed(lambda way=way: way(truth, probability))
        for key, values in found.items():
            np.testing.assert_allclose(getattr(swept, key), values, rtol=1e-9)
        print(f"| Dice, IoU, precision, recall | {name} | {seconds:.2f} | {seconds / one:.0f} |", flush=True)
    one, answers = timed(lambda: metrics.two_pixel(truth, probability, GRID))
    print(f"| 2-pixel F1 | one pass | {one:.2f} | 1 |", flush=True)
    seconds, found = timed(lambda: two_pixel(truth, probability))
    np.testing.assert_allclose(answers.f1, found, rtol=1e-9)
    print(f"| 2-pixel F1 | a mask at a time | {seconds:.2f} | {seconds / one:.0f} |", flush=True)


def validate(count: int, side: int, blackened: bool) -> None:
    """What `model.evaluate.score` and a trial's replays do after the forward pass; prints a row."""
    builder, strided = CountsBuilder(), CountsBuilder()
    labels, spent, distinct = [], 0.0, 0
    peak = own_mib()
    for n, (truth, logits) in enumerate(images(count, side)):
        there = torch.from_numpy(logits)
        began = time.perf_counter()
        half_HW = to_half(there).numpy()
        columns = tally(np, half_HW, truth)
        builder.add(columns)
        first = -n * truth.size % 10
        every = half_HW.ravel()[None, first::10], truth.ravel()[None, first::10]
        strided.add(tally(np, *every, tolerance=0))
        spent += time.perf_counter() - began
        labels.append(bool(truth.any()))
        distinct += len(columns[0])
        peak = max(peak, own_mib()) if n % 50 == 0 else peak
    began = time.perf_counter()
    decisions = np.where(labels, 1.0, -1.0) + np.random.default_rng(1).normal(0, 0.4, count)
    scores = Scores(builder.build(), {10: strided.build()}, np.array(labels), decisions)
    ways = [Judgement(*rule, black, 1.0, "objective") for rule in _RULES for black in {False, blackened}]
    scores.figures([scores.choose(way) for way in ways])
    chosen = time.perf_counter() - began
    peak = max(peak, own_mib())
    per_image = distinct / count
    print(f"| {count} | {per_image:.0f} | {spent:.2f} | {chosen:.2f} | {spent + chosen:.2f} | {peak:.0f} |", flush=True)


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=448, help="px")
    parser.add_argument("--validate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.validate:
        validate(options.validate, options.side, blackened=True)
        return
    compare(options.images, options.side)
    print(f"\nBeyond the forward pass, {torch.get_num_threads()} threads: 4 rules, blackened and not, all figures\n")
    print("| images | distinct scores an image | s counting | s choosing | s in all | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for count in (200, 800, 1695):  # each in a process of its own, for its memory
        subprocess.run(  # noqa: S603
            [sys.executable, "-m", "bench.thresholds", "--validate", str(count), "--side", str(options.side)],
            check=True,
        )


if __name__ == "__main__":
    main()
