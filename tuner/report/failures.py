"""The test images that went most wrong, by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.arrays import Array, Bools, Ints
from model.thresholds import sigmoid
from tuner.report import words
from tuner.report.gallery import Block, Table, Text
from tuner.report.tables import Judged

_ROWS = 12


@dataclass(frozen=True)
class Failures:
    """Rows of the split by kind, the worst first."""

    missed: Ints
    """images with a defect that were decided negative or whose mask is empty; most pixels of the truth first"""
    false_alarms: Ints
    """images without one that were decided positive or whose mask is not empty; most false pixels first"""
    poor: Ints
    """the other images with a defect and a mask, by Dice"""


def find(test: Judged) -> Failures:
    truth, predicted = test.selected.truth[:, 0], test.selected.predicted[:, 0]
    defect = test.split.labels | (truth > 0)
    decided = test.decisions if test.decisions is not None else np.ones(len(defect), bool)
    missed = defect & (~decided | ((predicted == 0) & (truth > 0)))
    alarm = ~defect & ((predicted > 0) | (decided if test.decisions is not None else False))
    poor = defect & ~missed & (test.dice < 1)

    def ordered(rows_N: Bools, *keys: Array) -> Ints:
        return np.array([n for n in np.lexsort(keys) if rows_N[n]], np.int64)

    return Failures(
        ordered(missed, test.dice, -truth),
        ordered(alarm, -test.split.decision_logits, -predicted),
        ordered(poor, -truth, test.dice),
    )


def shown(found: Failures, rows: int = _ROWS) -> list[tuple[str, int]]:
    """(kind, row) of those that a table shows: equal parts, and what a kind leaves goes to the others."""
    kinds = (("missed", found.missed), ("false alarm", found.false_alarms), ("poor mask", found.poor))
    counts = dict.fromkeys((name for name, _ in kinds), 0)
    while sum(counts.values()) < rows:
        open_ones = [name for name, all_of_it in kinds if counts[name] < len(all_of_it)]
        if not open_ones:
            break
        counts[min(open_ones, key=counts.__getitem__)] += 1
    return [(name, int(n)) for name, all_of_it in kinds for n in all_of_it[: counts[name]]]


def blocks(test: Judged, example_names: Sequence[str]) -> list[Block]:
    """`example_names` are those of the pictures in dices/, in their order."""
    found = find(test)
    chosen = shown(found)
    if not chosen:
        return [Text("No test image went wrong: every decision is right and every mask equals the truth.")]
    ranks = {name: rank for rank, name in reversed([*enumerate(example_names, start=1)])}
    sources = [" ".join(source.split()) for source in test.split.sources]
    has_sources, has_scores = len(set(sources)) > 1, test.decisions is not None
    header = ["kind", "image", *(["source"] if has_sources else []), "picture", "truth, px", "mask, px", "Dice"]
    header += [*(["score"] if has_scores else []), "what happened"]
    rows = []
    scores = sigmoid(test.split.decision_logits)
    for kind, n in chosen:
        name = test.split.names[n]
        row = [kind.replace(" ", "\N{NO-BREAK SPACE}"), words.shorten(" ".join(name.split()), 36)]
        row += [words.shorten(sources[n], 24)] if has_sources else []
        row += [f"{ranks[name]:03d}" if name in ranks else words.NONE]
        row += [f"{test.selected.truth[n, 0]:,}", f"{test.selected.predicted[n, 0]:,}", words.figure(test.dice[n])]
        row += [words.probability(float(scores[n]))] if has_scores else []
        rows.append([*row, what_happened(test, n)])
    last = len(header) - 1
    numeric = frozenset(range(2 + has_sources, last))
    counts = f"{len(found.missed):,} of {words.plural(int(test.split.labels.sum()), 'image')} with a defect missed"
    alarms = words.plural(len(found.false_alarms), "false alarm")
    text = (
        f"Over the whole test split: {counts} (decided negative, or an empty mask), {alarms} among "
        f"{words.plural(int((~test.split.labels).sum()), 'image')} without one (decided positive, or a mask that is "
        "not empty). Missed ones are sorted by their truth, false alarms by their mask, poor masks by Dice. Picture is "
        "the number of the file in dices/; full names are in predictions.csv."
    )
    return [Table(header, rows, "The worst failures on test images", numeric), Text(text)]


def what_happened(test: Judged, n: int) -> str:
    """In words."""
    truth, predicted, hits = (int(table[n, 0]) for table in (test.selected.truth, *test.selected[:2]))
    words_ = []
    if test.decisions is not None and bool(test.decisions[n]) != bool(test.split.labels[n]):
        words_.append("decided positive" if test.decisions[n] else "decided negative")
    words_.append(_mask(truth, predicted, hits))
    return ", ".join(words_)


def _mask(truth: int, predicted: int, hits: int) -> str:
    if truth == 0:
        return "mask empty" if predicted == 0 else "marked where nothing is"
    if predicted == 0:
        return "mask empty"
    if hits == 0:
        return "mask beside the defect"
    found, right = hits / truth, hits / predicted
    if found < 0.5 and right < 0.5:
        return f"{_percent(found)} of the defect found, {_percent(1 - right)} of the mask false"
    if right < found:
        return f"{_percent(1 - right)} of the mask false"
    return f"{_percent(1 - found)} of the defect not found"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.005 <= share <= 0.995 else "hardly any" if share < 0.5 else "nearly all"
