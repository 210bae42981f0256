"""The test images that went most wrong, by kind."""

from __future__ import annotations

from collections.abc import Sequence

from model import failures
from model.failures import Failures
from model.thresholds import sigmoid
from tuner.report import words
from tuner.report.gallery import Block, Table, Text
from tuner.report.tables import Judged


def find(test: Judged) -> Failures:
    """Of a split at its thresholds."""
    selected, split = test.selected, test.split
    predicted_N, truth_N = selected.predicted[:, 0], selected.truth[:, 0]
    return failures.find(split.labels, test.decisions, split.decision_logits, predicted_N, truth_N, test.dice)


def blocks(test: Judged, example_names: Sequence[str]) -> list[Block]:
    """`example_names` are those of the pictures in dices/, in their order."""
    found = find(test)
    chosen = found.shown()
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
    if min(found, right) > 0.995:
        return "mask equals the truth" if found == right == 1 else "mask nearly equals the truth"
    if found < 0.5 and right < 0.5:
        return f"{_percent(found)} of the defect found, {_percent(1 - right)} of the mask false"
    if right < found:
        return f"{_percent(1 - right)} of the mask false"
    return f"{_percent(1 - found)} of the defect not found"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.005 <= share <= 0.995 else "hardly any" if share < 0.5 else "nearly all"
