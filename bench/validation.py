"""What a validation costs beyond the forward pass: tables and rules, as they are and as they were.

    python -m bench.validation [--images 400] [--side 448] [--width 1.0] [--precision bfloat16]

On the GPU where there is one, else on the processor. `before` is the way until now: an image at a time with a wait for
the device after each operation, and thresholds that go through the tables image by image, as often as they are asked.
Both count the same maps, are asked the same 32 judgements (four rules, blackened or not, lowered or not, two ways of
keeping an epoch) and must agree to the last count and figure. On a GPU, or with --forward, a whole validation is then
timed against the network's pass alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.thresholds import images
from model import metrics
from model.arrays import Array, Bools, Ints
from model.config import Judgement, RunConfig
from model.counts import CountsBuilder, PixelCounts, Selected, least_codes, tally, to_half
from model.curves import best_f_measure
from model.data import input_batches, to_input
from model.evaluate import Scores, _count_batch, _count_images, predict, score
from model.network import build
from model.thresholds import Thresholds, ThresholdSearch, select_all, sigmoid

RULES = (("min_of_max", 1), ("pr_curve", 1), ("pr_curve", 10), ("grid", 1))
JUDGEMENTS = [
    Judgement(*rule, blacken, lower, best_by)
    for rule in RULES
    for blacken in (False, True)
    for lower in (1.0, 0.9)
    for best_by in ("objective", "both")
]
FACTORS = (1, 10)
KINDS = ("background", "margin", "truth", "reached")
BATCH = 8


class CountsBefore(PixelCounts):
    """The tables, summed up image by image."""

    def at(self, thresholds_K: Array | float) -> Selected:
        least = least_codes(np.atleast_1d(np.asarray(thresholds_K, np.float64)))
        out = np.empty((4, len(self), len(least)), np.int64)
        whole = np.empty((2, len(self), 1), np.int64)
        for n in range(len(self)):
            rows = self.of(n)
            kinds = np.stack([rows[kind] for kind in KINDS])
            above = np.zeros((4, len(rows) + 1), np.int64)
            np.cumsum(kinds[:, ::-1], axis=1, out=above[:, -2::-1])
            background, margin, truth, reached = above[:, np.searchsorted(rows["code"], least)]
            out[:, n] = background + margin + truth, truth, margin + truth, reached
            whole[:, n, 0] = above[2, 0], above[:3, 0].sum()
        return Selected(*out, *whole)

    def truth(self) -> Ints:
        return np.array([self.of(n)["truth"].sum(dtype=np.int64) for n in range(len(self))])

    def _dense(self, images: Ints | None, kept_N: Bools) -> Ints:
        dense = np.zeros((2, 65537), np.int64)
        for n in range(len(self)) if images is None else images:
            rows = self.of(n)
            inside, outside = rows["truth"], rows["background"] + rows["margin"]
            if kept_N[n]:
                at = rows["code"].astype(np.int64) + 32769
                dense[0, at] += inside
                dense[1, at] += outside
            else:
                dense[:, 0] += inside.sum(), outside.sum()
        return dense


def maps(count: int, side: int, device: torch.device) -> Iterator[tuple[torch.Tensor, Array]]:
    """A batch after another of logits, as bfloat16 holds them but float32, and the truth; few images, shifted."""
    few = list(images(min(count, 24), side))
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        logits, truth = (np.stack([np.roll(few[row % len(few)][part], row, axis=1) for row in rows]) for part in (1, 0))
        yield torch.from_numpy(logits).to(device).bfloat16().float(), truth


def count_before(counts: dict[int, CountsBuilder], half_BHW: torch.Tensor, masks_BHW: Array, first_row: int) -> None:
    """An image at a time, on the device."""
    if half_BHW.device.type == "cpu":
        _count_images(counts, half_BHW, masks_BHW, first_row)
        return
    for row, (half_HW, mask_HW) in enumerate(zip(half_BHW, masks_BHW, strict=True), start=first_row):
        there = half_HW, torch.from_numpy(mask_HW).to(half_HW.device)
        for factor, builder in counts.items():
            if factor == 1:
                builder.add(tally(torch, *there))
            else:
                every = (one.ravel()[None, -row * mask_HW.size % factor :: factor] for one in there)
                builder.add(tally(torch, *every, tolerance=0))


def tables(count: int, side: int, device: torch.device, way: Any) -> tuple[float, dict[int, PixelCounts], Bools]:
    """Seconds, the tables, and which images have a defect."""
    builders = {factor: CountsBuilder() for factor in FACTORS}
    seconds, labels = 0.0, []
    for warm in (True, False):
        for n, (logits, truth) in enumerate(maps(BATCH if warm else count, side, device)):
            _wait(device)
            began = time.perf_counter()
            into = {factor: CountsBuilder() for factor in FACTORS} if warm else builders
            way(into, to_half(logits), truth, n * BATCH)
            _wait(device)
            if not warm:
                seconds += time.perf_counter() - began
                labels += truth.any(axis=(1, 2)).tolist()
    return seconds, {factor: builder.build() for factor, builder in builders.items()}, np.array(labels)


def judged_before(scores: Scores) -> list[dict[str, float | None]]:
    """Each judgement by itself."""
    counts = {n: CountsBefore(one.rows, one.offsets) for n, one in {1: scores.counts, **scores.strided}.items()}
    decision, _ = scores.decision
    kept = np.ones(len(scores.labels), bool), scores.decision_logits >= (-np.inf if decision is None else decision)
    searches = [ThresholdSearch(counts[1], counts, one) for one in kept]
    found = []
    for rule, factor, blacken, lower, _ in JUDGEMENTS:
        search = searches[blacken]
        if rule == "pr_curve":
            logit = best_f_measure(counts[factor].pixel_curve(search._kept))[0]
        else:
            logit = search.choose(rule)
        found.append(Thresholds(rule, factor, logit, decision, blacken, lower))
    out = []
    for one, selected in zip(found, select_all(found, counts[1], scores.decision_logits), strict=True):
        values = metrics.figures(selected, scores.labels, scores.decision_logits)
        values["threshold"] = float(sigmoid(one.segmentation_logit))
        out.append({name: None if np.isnan(value) else value for name, value in values.items()})
    return out


def compare(count: int, side: int, device: torch.device) -> None:
    """Tables and rules, both ways."""
    was, before, labels = tables(count, side, device, count_before)
    way = _count_images if device.type == "cpu" else _count_batch
    now, after, _ = tables(count, side, device, way)
    for factor in FACTORS:
        np.testing.assert_array_equal(after[factor].rows, before[factor].rows)
    rng = np.random.default_rng(0)
    decisions = to_half(np.where(labels, 1.0, -1.0) + rng.normal(0, 0.8, count)).astype(np.float64)
    scores = Scores(after[1], {10: after[10]}, labels, decisions)
    began = time.perf_counter()
    theirs = judged_before(scores)
    judged_was = time.perf_counter() - began
    began = time.perf_counter()
    ours = scores.figures([scores.choose(one) for one in JUDGEMENTS])
    judged_now = time.perf_counter() - began
    assert ours == theirs
    rows = len(after[1].rows) / count
    print(f"{count} images of {side}x{side}, {rows:.0f} distinct scores an image, {len(JUDGEMENTS)} judgements\n")
    print("| part | before, ms an image | now, ms an image | ratio | now, s for 1,695 images |")
    print("| --- | --- | --- | --- | --- |")
    if device.type == "cpu":  # counted the same way before and now
        was = now = min(was, now)
        batched, _, _ = tables(count, side, device, _count_batch)
        print(f"| tables with torch, a batch at once: not done on a processor | {1000 * was / count:.3f} | ", end="")
        print(f"{1000 * batched / count:.3f} | {was / batched:.2f} | {1695 * batched / count:.2f} |")
    for name, a, b in (
        ("tables", was, now),
        ("rules", judged_was, judged_now),
        ("both", was + judged_was, now + judged_now),
    ):
        each = b / count
        print(f"| {name} | {1000 * a / count:.3f} | {1000 * each:.3f} | {a / b:.1f} | {1695 * each:.2f} |", flush=True)


def whole(count: int, side: int, width: float, precision: str, device: torch.device) -> None:
    """A validation against the network's pass alone, of the same images from memory."""
    torch.manual_seed(0)
    network = build("segdecnet_decoder", width=width).to(device)
    config = RunConfig(input_height=side, input_width=side, width=width, precision=precision)
    few = list(images(min(count, 24), side))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (len(few), side, side, 3), np.uint8)[np.arange(count) % len(few)]
    masks = np.stack([few[n % len(few)][0] for n in range(count)])
    cache: Any = SimpleNamespace(images=pixels, masks=masks, positive=masks.any(axis=(1, 2)))

    for n, inputs in enumerate(input_batches(pixels, device, BATCH)):  # memory that is used again holds what it should
        assert torch.equal(inputs, to_input(pixels[n * BATCH : (n + 1) * BATCH], device))

    def forward() -> None:
        for _ in predict(network, cache.images, config, device):
            pass

    def judged() -> None:
        scores = score(network, cache, config, device, FACTORS)
        scores.figures([scores.choose(one) for one in JUDGEMENTS])

    found = {}
    for name, one in (("forward alone", forward), ("validation", judged), ("forward again", forward)):
        _wait(device)
        if not found:
            one()
            _wait(device)
        began = time.perf_counter()
        one()
        _wait(device)
        found[name] = time.perf_counter() - began
    print(f"\n{count} images of {side}x{side}, width {width:g}, {precision}, batches of {BATCH}\n")
    print("| part | s | images/s | s for 1,695 images |\n| --- | --- | --- | --- |")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} | {count / seconds:.1f} | {1695 * seconds / count:.2f} |")
    beyond = found["validation"] - min(found["forward alone"], found["forward again"])
    print(
        f"\nBeyond the forward pass: {1000 * beyond / count:.3f} ms an image, {1695 * beyond / count:.2f} s for 1,695"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--side", type=int, default=448, help="px")
    parser.add_argument("--width", type=float, default=1.0, help="of the network")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--forward", action="store_true", help="time whole validations on a processor too")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    compare(options.images, options.side, device)
    if options.forward or device.type == "cuda":
        whole(options.images, options.side, options.width, options.precision, device)


if __name__ == "__main__":
    main()
