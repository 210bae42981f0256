"""The head of the page: the headline figures, winner against baseline in a sentence, the best configuration."""

from __future__ import annotations

import numpy as np

from model.arrays import Floats
from tuner import records
from tuner.report import examples, tables, words
from tuner.report.gallery import Block, Card, Cards, Gallery, Pictures, Section, Table, Text, stamped
from tuner.report.inputs import Candidate, EvaluatedRun, Json, Run
from tuner.report.tables import Results

STAMP = "thresholds chosen on test"
BEYOND = "constraints not met"


def evaluated(run: EvaluatedRun, results: Results, metrics: Json, gallery: Gallery) -> Section:
    rows = examples.best_rows(run.examples, 4)
    with_defect = " with a defect" if run.examples.truth.any() else ""
    strip = gallery.image(
        examples.headline_strip(run.examples, rows),
        "best-examples",
        f"Of the examples{with_defect}, those that the winner segments best: input, and the answer laid over it.",
    )
    blocks: list[Block] = [Cards(_cards(run, metrics)), Text(verdict(run, results)), Pictures([strip])]
    head = Section("top", "", blocks)
    if results.test.is_stamped:
        head = stamped(head, STAMP)
    if run.winner.is_beyond:
        head = stamped(head, BEYOND)
    return Section("top", "", [*head.blocks, *([_best_configuration(run)] if run.searched else [])])


def state(run: Run) -> str:
    """How far a search that was not evaluated has come."""
    state: str = run.facts["state"]
    return {"running": "not ended", "finished": "ended"}.get(state, state)


_WHY_UNEVALUATED = {
    "running": "The search had not ended when this was written: it runs, or it was killed, and `tuner resume` goes on.",
    "stopped": "The search was stopped; `tuner resume` goes on with it.",
    "failed": "The search failed; why stands under Search. `tuner resume` goes on with it.",
    "finished": "The search has ended, and its winner is not evaluated yet; `tuner finals` does it.",
}


def unevaluated(run: Run, metrics: Json) -> Section:
    """What there is before the test split was opened."""
    why, chosen = _WHY_UNEVALUATED[run.facts["state"]], run.chosen
    if chosen is None:
        none = "No trial has completed, so there is no best configuration"
        ended = run.facts["state"] == "finished"
        return Section("top", "", [Text(f"{none}, and nothing to evaluate." if ended else f"{none} yet. {why}")])
    metric, value = words.metric(run.objectives[0]["metric"]), words.figure(chosen.value, 4)
    unseen = "an evaluation on test was begun, and cut short" if run.openings else "nothing has been seen of test"
    where = f"on validation, in epoch {words.figure(chosen.epoch)}"
    if run.folds:
        where = f"on validation, the mean over {run.folds} folds"
    text = (
        f"{why} Best so far is trial {chosen.trial}: {metric} {value} {where}. It is the best of several on the images "
        f"that chose it, so luck is in the figure; {unseen}."
    )
    if chosen.is_beyond:
        text += f" No completed trial meets the constraints; it comes nearest: {records.beyond(chosen.violations)}."
    block: list[Block] = [Cards(_validation_cards(metrics)), Text(text)]
    return Section("top", "", [*block, *([_best_configuration(run)] if run.searched else [])])


def _validation_cards(metrics: Json) -> list[Card]:
    labels = {
        "dice_positive_mean": "validation Dice, positive images",
        "dice_mean": "validation Dice, all images",
        "iou_mean": "validation IoU, all images",
        "decision_ap": "validation decision AP",
    }
    found = metrics["validation"]
    return [
        Card(label, words.figure(found[key]), None, "chosen on it")
        for key, label in labels.items()
        if found[key] is not None
    ]


def _cards(run: EvaluatedRun, metrics: Json) -> list[Card]:
    test, baseline = metrics["test"], metrics["baseline"]

    def card(label: str, key: str) -> Card:
        note = "this is the baseline" if run.is_baseline else f"baseline {words.figure(baseline[key])}"
        if not run.is_baseline and key in baseline["ci95"]:
            note += f" ({words.interval(baseline['ci95'][key])})"
        return Card(label, words.figure(test[key]), words.interval(test["ci95"].get(key)), note)

    cards = [
        card("test Dice, positive images", "dice_positive_mean"),
        card("test Dice, all images", "dice_mean"),
        card("test IoU, all images", "iou_mean"),
    ]
    if test["tp"] is None:
        return [*cards, card("test pixel F1", "f1")]
    images = test["tp"] + test["fp"] + test["fn"] + test["tn"]
    wrong = f"{words.plural(test['fp'], 'false alarm')}, {test['fn']:,} missed of {words.plural(images, 'image')}"
    ap = card("test decision AP", "decision_ap")
    return [*cards, Card(ap.label, ap.value, ap.interval, wrong)]


def verdict(run: EvaluatedRun, results: Results) -> str:
    """Winner against baseline in one sentence, and what the data did not allow."""
    text = _constraints_first(run) + _comparison(run, results)
    if results.test.is_stamped:
        text = (
            "The thresholds were chosen on the test split, as the public scripts do (--open-test): the test figures "
            "are no estimates of what new images would give. " + text
        )
    if not run.has_negatives:
        text += (
            " The data have no images without a defect, so the decision was not trained: there is no confusion "
            "matrix, no decision AP and no decision AUC."
        )
    return text


def _constraints_first(run: EvaluatedRun) -> str:
    """What must be known before the winner is: that it, or the baseline, is not what was asked for."""
    if run.winner.is_beyond:
        return (
            f"No completed trial meets the constraints. Shown is the one that is least beyond them on validation: "
            f"{records.beyond(run.winner.violations)}. "
        )
    if run.baseline is not None and run.baseline.is_beyond:
        return f"The baseline does not meet the constraints: {records.beyond(run.baseline.violations)}. "
    return ""


def _comparison(run: EvaluatedRun, results: Results) -> str:
    if run.is_baseline:
        if run.winner.is_beyond:
            return "It is the baseline."
        return "The search found nothing better than the baseline: the winner is the baseline."
    if run.baseline is None:
        return "There is no baseline to compare with."
    gains = tables.differences(results)
    better = results.test.dice - results.baseline_test.dice if results.baseline_test else results.test.dice
    labels = results.test.split.labels
    sentences = [_difference("test image", gains["dice_mean"], better)]
    if not labels.all() and "dice_positive_mean" in gains:
        sentences.append(_difference("test image with a defect", gains["dice_positive_mean"], better[labels]))
    return " ".join(sentences)


def _difference(images: str, gain: tables.Difference, better_N: Floats) -> str:
    """Winner against baseline on some images, in a sentence; `better_N` is by how much on each."""
    counted = words.plural(len(better_N), "test image") + images.removeprefix("test image")
    text = (
        f"On the same {counted} the winner's Dice is {abs(gain.value):.3f} {'higher' if gain.value >= 0 else 'lower'} "
        f"than the baseline's on average"
    )
    counts = f"higher on {np.sum(better_N > 0):,}, lower on {np.sum(better_N < 0):,}"
    if gain.interval is None:
        return text + f" ({counts}; these are too few groups of images, or too much alike, for an interval)."
    low, high = gain.interval
    text += f" (95 % interval of the difference {low:+.3f} to {high:+.3f}; {counts})"
    if low > 0:
        return text + ", which chance in the choice of test images does not explain."
    if high < 0:
        return text + ": there the winner is worse."
    return text + ": the interval holds zero, so these images do not tell the two apart."


def _best_configuration(run: Run) -> Table:
    rows = [
        [name, setting(run.chosen, name), setting(run.compared_with, name), words.search_range(parameter)]
        for name, parameter in run.searched.items()
    ]
    caption = "The best configuration among what was searched"
    return Table(["parameter", "best", "baseline", "searched"], rows, caption, label="configuration")


def setting(candidate: Candidate | None, name: str) -> str:
    """A field of a configuration."""
    return words.NONE if candidate is None else words.setting(candidate.config.get(name))
