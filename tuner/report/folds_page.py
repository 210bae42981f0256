"""The parts of the page on cross-validation: the folds of a trial, and what the search as a whole is worth."""

from __future__ import annotations

from tuner.report import words
from tuner.report.gallery import Block, Section, Table, Text
from tuner.report.inputs import Json, Run


def training(run: Run, record: Json, best_one: str) -> Section:
    """What each fold of the winner came to, in place of the curves of one training."""
    metric = words.metric(run.objectives[0]["metric"])
    folds = record["folds"]
    is_nested = any("outer" in fold for fold in folds)
    value = "chosen on the next fold" if is_nested else "held-out fold"
    header = ["fold", f"{metric}, {value}", "epoch", "threshold", *([f"{metric}, outer fold"] if is_nested else [])]
    rows = [
        [str(n), words.figure(fold["value"], 4), words.figure(fold["epoch"]),
         words.probability((fold["thresholds"] or {}).get("segmentation_probability")),
         *([words.figure(fold.get("outer"), 4)] if is_nested else [])]
        for n, fold in enumerate(folds, start=1)
    ]  # fmt: skip
    text = (
        f"A trial is {run.folds} trainings, each judged on groups of images that it was not given; its value is their "
        f"mean, {words.figure(record['value'], 4)}. The network of fold {record['fold']}, whose value is the median of "
        f"the folds, stands for the {best_one} and is what is evaluated and handed over; validation figures of the "
        "evaluation are of the images that chose its thresholds, another fold than the baseline's may be."
    )
    strong = frozenset({record["fold"] - 1}) if record["fold"] else frozenset()
    caption = f"The folds of trial {record['trial']}; the one whose network is handed over stands out"
    return Section("curves", "Training", [Text(text), Table(header, rows, caption, frozenset(range(5)), strong)])


def nested(run: Run, metrics: Json) -> list[Block]:
    """What nested cross-validation says of the search; nothing where it is not nested."""
    found = metrics["nested"]
    if found is None:
        return []
    metric = words.metric(run.objectives[0]["metric"])
    rows = [
        [str(fold["fold"]), fold["trial"], words.figure(fold["inner"], 4), words.figure(fold["outer"], 4)]
        for fold in found["folds"]
    ]
    rows.append(["mean", "", words.figure(found["inner"], 4), words.figure(found["value"], 4)])
    text = (
        f"Nested cross-validation: the search, with its choice of the best of "
        f"{words.plural(found['trials'], 'completed trial')}, gives {metric} {words.figure(found['value'], 4)} on "
        f"folds that did not choose ({words.interval(found['ci95'])}, a rough 95 % t interval over folds, which share "
        "training images). Which trials were proposed does depend on all folds."
    )
    header = ["fold", "best without it", f"{metric}, inner fold", f"{metric}, this fold"]
    caption = "For each fold the trial that is best without it, and what it does there"
    return [Text(text), Table(header, rows, caption, frozenset({0, 2, 3}), frozenset({len(rows) - 1}))]
