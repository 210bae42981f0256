"""Every threshold rule at the winner's weights: what it would have picked, and what that gives on both splits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from model.arrays import Ints
from model.counts import Selected
from model.intervals import Ratio, difference_interval
from model.metrics import figures
from model.thresholds import Thresholds, ThresholdSearch, select_all, sigmoid
from tuner.report import words
from tuner.report.gallery import Block, Table, Text
from tuner.report.inputs import EvaluatedRun, Json, Split
from tuner.report.tables import Results, number

Way = tuple[str, int, bool, float]
"""rule, factor, whether images decided negative are blackened, lowered threshold"""


def replay(run: EvaluatedRun, results: Results) -> list[Json]:
    """A row a way, for metrics.json; the winner's own one has `own`. `threshold` and the figures are None where the
    threshold cannot be known any more."""
    own = Thresholds.from_dict(run.winner.thresholds)
    mine = (own.rule, own.factor, own.blacken, own.lower_threshold)
    # Stored thresholds of other ways were chosen on validation, by a network that is the winner's at its epoch only.
    record, is_own = run.history_record()
    stored = (record.get("replays") or []) if record is not None and is_own and own.chosen_on == "validation" else []
    ways = _ways(mine, [_way(one) for one in stored])
    known = {
        _way(one)[:3]: one["thresholds"]["segmentation_logit"]
        for one in stored
        if (one["epoch"], one.get("fold")) == (run.winner.epoch, run.winner.fold) and one["thresholds"]
    } | {mine[:3]: own.segmentation_logit}
    chosen_on = results.test.split if own.chosen_on == "test" else results.validation.split
    logits = _choose(ways, known, own, chosen_on)
    found = {
        way: replace(own, rule=way[0], factor=way[1], segmentation_logit=logit, blacken=way[2], lower_threshold=way[3])
        for way, logit in logits.items()
        if logit is not None
    }
    judged = [
        dict(zip(found, select_all([*found.values()], split.counts, split.decision_logits), strict=True))
        for split in (results.validation.split, results.test.split)
    ]
    rows = []
    for way in ways:
        row = dict(zip(("rule", "factor", "blacken", "lower_threshold"), way, strict=True)) | {"own": way == mine}
        row |= dict.fromkeys(("threshold", "validation", "test", "difference"))
        if way in found:
            validation, test = judged
            row["threshold"] = float(sigmoid(found[way].segmentation_logit))
            row["validation"] = _figures(validation[way], results.validation.split)
            row["test"] = _figures(test[way], results.test.split)
            row["difference"] = None if way == mine else _difference(test[way], test[mine], results.test.groups)
        rows.append(row)
    return rows


def _way(replayed: Json) -> Way:
    names = ("threshold_rule", "threshold_factor", "blacken", "lower_threshold")
    rule, factor, blacken, lower = (replayed[name] for name in names)
    return rule, factor if rule == "pr_curve" else 1, blacken, lower


def _ways(mine: Way, stored: list[Way]) -> list[Way]:
    """Every rule with the winner's treatment of masks, and its rule with every other treatment that was tried."""
    rule, factor = mine[:2]
    factors = {1} | {way[1] for way in [*stored, mine] if way[0] == "pr_curve"}
    rules = [("min_of_max", 1), *(("pr_curve", n) for n in sorted(factors)), ("grid", 1)]
    others = sorted({way[2:] for way in stored} - {mine[2:]})
    return [
        *((name, n, mine[2], mine[3]) for name, n in rules),
        *((rule, factor, blacken, lower) for blacken, lower in others),
    ]


def _choose(
    ways: list[Way], known: dict[tuple[str, int, bool], float], own: Thresholds, split: Split
) -> dict[Way, float | None]:
    """Thresholds, logits, from the split's tables; of a factor above 1, whose tables are not kept, a known one."""
    has_truth = bool((split.counts.truth() > 0).any())
    searches = {}
    for blacken in {way[2] for way in ways}:
        one = Thresholds("grid", 1, own.segmentation_logit, own.decision_logit, blacken)
        searches[blacken] = ThresholdSearch(split.counts, {}, one.kept(split.decision_logits))
    out: dict[Way, float | None] = {}
    for way in ways:
        rule, factor, blacken, _ = way
        logit = known.get(way[:3])
        if logit is None and factor == 1 and has_truth:
            logit = searches[blacken].choose(rule)
        out[way] = logit
    return out


def _figures(selected: Selected, split: Split) -> dict[str, Any]:
    values = figures(selected, split.labels, split.decision_logits)
    positive = selected.dice()[split.labels, 0]
    values["dice_positive_std"] = float(positive.std()) if len(positive) else float("nan")
    keys = ("dice_mean", "dice_std", "dice_positive_mean", "dice_positive_std", "iou_mean", "iou_std", "f1")
    return {key: number(values[key]) for key in keys}


def _difference(selected: Selected, own: Selected, groups_N: Ints) -> Json:
    """Of the mean Dice of all test images, to the winner's own rule."""
    ours, theirs = selected.dice()[:, 0], own.dice()[:, 0]
    every = np.ones(len(ours))
    interval = difference_interval(Ratio(ours, every), Ratio(theirs, every), groups_N)
    return {"value": float(ours.mean() - theirs.mean()), "ci95": interval}


def blocks(rows: list[Json], epoch: int | None, chosen_on: str) -> list[Block]:
    """The table of the rows, what it is, and what is left out."""
    shown = [row for row in rows if row["threshold"] is not None]
    treated = len({(row["blacken"], row["lower_threshold"]) for row in shown}) > 1
    header = ["rule", *(["masks"] if treated else []), "threshold", "validation Dice, all", "positive"]
    header += ["test Dice, all", "positive", "IoU", "pixel F1", "Dice, all: minus own rule"]
    table = Table(
        header,
        [_row(row, treated) for row in shown],
        f"Every rule at the winner's weights, thresholds chosen on {chosen_on}; mean ± standard deviation over images",
        frozenset(range(2 if treated else 1, len(header))),
        frozenset(k for k, row in enumerate(shown) if row["own"]),
        label="rules",
    )
    where = "the winner's weights" if epoch is None else f"the winner's weights, those of epoch {epoch},"
    if chosen_on == "test":
        text = (
            f"All rows are of {where} and no estimates: their thresholds were chosen on the images they are judged on."
        )
    else:
        text = (
            f"All rows are of {where} and thresholds were chosen on validation. Only the winner's own rule, which is "
            "set off, was chosen before the test split was opened; the other rows show what the rule is worth, and to "
            "pick one of them by its test figures would be to choose on test."
        )
    return [table, Text(f"{text} {_left_out(rows)}".strip())]


def _row(row: Json, treated: bool) -> list[str]:
    validation, test, difference = row["validation"], row["test"], row["difference"]

    def spread(figures: Json, key: str) -> str:
        return words.mean_std(figures[f"{key}_mean"], figures[f"{key}_std"])

    return [
        words.rule(row["rule"], row["factor"]),
        *([_treatment(row)] if treated else []),
        words.probability(row["threshold"]),
        *(spread(validation, key) for key in ("dice", "dice_positive")),
        *(spread(test, key) for key in ("dice", "dice_positive", "iou")),
        words.figure(test["f1"]),
        "own rule" if row["own"] else words.difference(difference["value"], difference["ci95"]),
    ]


def _treatment(row: Json) -> str:
    parts = ["blackened"] if row["blacken"] else []
    parts += [f"lowered to {row['lower_threshold']:g} of it"] if row["lower_threshold"] < 1 else []
    return ", ".join(parts) or "as they are"


def _left_out(rows: list[Json]) -> str:
    names = list(dict.fromkeys(words.rule(row["rule"], row["factor"]) for row in rows if row["threshold"] is None))
    if not names:
        return ""
    if any(row["factor"] == 1 for row in rows if row["threshold"] is None):
        return f"Left out: {', '.join(names)}; no image to choose on has a mask with a defect."
    return (
        f"Left out: {', '.join(names)}; their thresholds come from tables of every n-th pixel, which are not kept, and "
        "none was chosen at this epoch."
    )
