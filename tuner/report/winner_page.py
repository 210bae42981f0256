"""The parts of the page on how well the winner does: test, training, thresholds, example images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from model import intervals
from tuner.report import breakdown, calibration, charts, examples, failures, folds_page, rules, style, tables, words
from tuner.report.gallery import Block, Fold, Gallery, Picture, Pictures, Section, Table, Tables, Text
from tuner.report.inputs import EvaluatedRun, Json, Run
from tuner.report.tables import Judged, Results

LOSSES = ("segmentation", "decision", "total")


def test(results: Results, metrics: Json, gallery: Gallery) -> Section:
    """The test split at the winner's thresholds, beside the baseline."""
    judged, baseline = results.test, results.baseline_test
    pictures: list[Picture] = []
    blocks: list[Block] = [_test_table(metrics), Text(_why_no_interval(judged, metrics))]
    if metrics["test"]["tp"] is None:
        blocks.append(Text("Without images that have no defect there is no decision to judge."))
    else:
        pictures.append(
            gallery.figure(
                charts.confusion(metrics["test"]),
                "confusion",
                "Test images by label and decision; shares of a row.",
                "third",
            )
        )
    if metrics["test"]["decision_auc"] is not None:
        pictures.append(
            gallery.figure(charts.roc(judged, baseline), "roc", "ROC of the decision on test images.", "third")
        )
        caption = "Precision and recall of the decision on test images."
        pictures.append(
            gallery.figure(charts.image_precision_recall(judged, baseline), "precision-recall", caption, "third")
        )
    if pictures:
        blocks.append(Pictures(pictures))
    if metrics["test"]["tp"] is not None and metrics["test"]["decision_auc"] is None:
        blocks.append(Text("ROC and precision-recall need test images with a defect and without; one kind is missing."))
    blocks.append(Pictures(_pixel_pictures(results, gallery)))
    if judged.split.labels.any():
        blocks.append(Pictures(_dice_pictures(judged, baseline, gallery)))
    blocks += breakdown.by_size(judged, baseline, gallery)
    if (by_source := breakdown.by_source(judged, baseline)) is not None:
        blocks.append(by_source)
    blocks += calibration.blocks(judged, metrics["calibration"], gallery)
    return Section("test", "Test", blocks)


_KINDS = {
    "masks, mean over images": (
        *("dice_mean", "dice_positive_mean", "iou_mean", "iou_positive_mean", "precision_mean", "recall_mean"),
        *("two_pixel_f1", "tolerance_f1", "cl_dice", "cl_iou"),
    ),
    "masks, pixels of all images pooled": (
        *("precision", "recall", "f1", "f1_positive", "iou_pooled", "iou_pooled_positive", "iou_two_class"),
    ),
    "masks, over all thresholds": ("pixel_ap", "aiu", "ods", "ois"),
    "decision on images": (
        *("tp", "fp", "fn", "tn", "decision_ap", "decision_auc", "decision_accuracy", "decision_precision"),
        *("decision_recall", "decision_specificity", "decision_f1"),
    ),
}


def _test_table(metrics: Json) -> Table:
    """Every figure; what each one is stands at the end of the page. Columns that would be empty are left out."""
    test, baseline, differences = metrics["test"], metrics["baseline"], metrics["difference"]
    judged = {"winner": test} | ({"baseline": baseline} if differences else {})
    header = ["figure"]
    for name, figures in judged.items():
        header += [name, "95 % interval"] if figures["ci95"] else [name]
    header += ["winner - baseline"] if differences else []
    rows: list[list[str]] = []
    strong = set()
    for title, keys in _KINDS.items():
        strong.add(len(rows))
        rows.append([title, *([""] * (len(header) - 1))])
        for key in keys:
            row = [words.metric(key)]
            for figures in judged.values():
                row.append(_with_spread(figures, key))
                row += [words.interval(figures["ci95"].get(key))] if figures["ci95"] else []
            if differences:
                gain = differences.get(key)
                row.append(words.difference(gain["value"], gain["ci95"]) if gain else "")
            rows.append(row)
    caption = f"Test split, at the thresholds chosen on {metrics['thresholds_chosen_on']}"
    return Table(header, rows, caption, frozenset(range(1, len(header))), frozenset(strong), "test")


def _with_spread(figures: Json, key: str) -> str:
    if key in ("dice_mean", "iou_mean"):
        return words.mean_std(figures[key], figures[key.replace("_mean", "_std")])
    return words.figure(figures[key])


def _why_no_interval(test: Judged, metrics: Json) -> str:
    """What the intervals are, and which of the winner's figures have none."""
    text = (
        "Intervals are over groups of test images, since images of one photo move together, and the difference is that "
        "of the same images. ± is the standard deviation over images. "
    )
    groups = int(test.groups.max()) + 1
    if groups < intervals.MIN_GROUPS:
        return text + f"There are none here ({intervals.why_none(groups)})."
    without = [key for keys in _KINDS.values() for key in keys if _lacks_interval(metrics["test"], key)]
    if not without:
        return text
    with_truth = intervals.contributing(test.selected.truth[:, 0], test.groups)
    of_labels = [intervals.contributing(side, test.groups) for side in (test.split.labels, ~test.split.labels)]
    return (
        f"{text}No interval for: {'; '.join(map(words.metric, without))}. Fewer than {intervals.MIN_GROUPS} groups "
        f"contribute to these ({with_truth} have a defect in a mask, {of_labels[0]} in a label, {of_labels[1]} have an "
        "image without one), or nearly all groups are alike."
    )


def _lacks_interval(judged: Json, key: str) -> bool:
    return key not in tables.CONFUSION_KEYS and judged[key] is not None and key not in judged["ci95"]


def _pixel_pictures(results: Results, gallery: Gallery) -> list[Picture]:
    validation, test = results.validation, results.test
    pictures = []
    if test.selected.truth.any():
        caption = "Precision and recall over all pixels of a split."
        figure = charts.pixel_precision_recall(validation, test)
        pictures.append(gallery.figure(figure, "pixel-precision-recall", caption))
    caption = "Mean Dice against the segmentation threshold."
    return [*pictures, gallery.figure(charts.dice_by_threshold(validation, test), "dice-by-threshold", caption)]


def _dice_pictures(test: Judged, baseline: Judged | None, gallery: Gallery) -> list[Picture]:
    pictures = [
        gallery.figure(charts.dice_histogram(test, baseline), "dice-histogram", "Dice of positive test images.")
    ]
    if baseline is not None and baseline is not test:
        pictures.append(
            gallery.figure(
                charts.pairs(test, baseline),
                "winner-and-baseline",
                "Each positive test image: winner against baseline.",
            )
        )
    return pictures


def curves(run: Run, gallery: Gallery) -> Section:
    """Losses and validation figures of the winner by epoch; of the best trial before it is evaluated."""
    record, own = run.history_record()
    best_one = "winner" if isinstance(run, EvaluatedRun) else "best trial"
    if record is None or not record["history"]:
        return Section(
            "curves", "Training", [Text(f"No curves by epoch were kept for the {best_one}'s configuration.")]
        )
    if record.get("folds"):
        return folds_page.training(run, record, best_one)
    history, best = record["history"], record["best_epoch"]
    blocks: list[Block] = []
    if not own:
        blocks.append(
            Text(
                f"The winner is a repeat with another seed; these are the curves of trial {record['trial']}, which has "
                "the same configuration."
            )
        )
    elif record["replayed_from"]:
        blocks.append(
            Text(
                f"The {best_one} is the network of trial {record['replayed_from']}, judged in another way; the "
                f"validation curves are at the thresholds of that trial, the best epoch is the {best_one}'s."
            )
        )
    losses = [
        _curve(
            gallery,
            history,
            f"loss-{kind}",
            [(f"loss_{kind}", kind, colour)],
            f"{kind} loss",
            f"{kind.capitalize()} loss on training images, by epoch.",
            None,
            style.THIRD,
            False,
        )
        for kind, colour in zip(LOSSES, (style.BLUE, style.ORANGE, style.INK), strict=True)
    ]
    pixels = [
        ("precision", "precision", style.BLUE),
        ("recall", "recall", style.ORANGE),
        ("f1", "F1", style.INK),
        ("two_pixel_f1", "2-pixel F1", style.GREEN),
    ]
    figures = [
        _curve(
            gallery,
            history,
            "validation-dice-iou",
            [("dice_mean", "Dice", style.BLUE), ("iou_mean", "IoU", style.GREEN)],
            "mean over all images",
            "Dice and IoU on validation.",
            best,
        ),
        _curve(
            gallery,
            history,
            "validation-pixels",
            pixels,
            "all pixels; 2-pixel F1: mean",
            "Pixel figures on validation.",
            best,
        ),
        _curve(
            gallery,
            history,
            "validation-decision",
            [("decision_ap", "AP", style.BLUE), ("decision_auc", "AUC", style.GREEN)],
            "decision on images",
            "Decision on validation.",
            best,
        ),
        _curve(
            gallery,
            history,
            "validation-threshold",
            [("threshold", "threshold", style.INK)],
            "threshold (probability)",
            "Segmentation threshold that the rule chose in each epoch.",
            best,
        ),
    ]
    blocks += [Pictures(shown) for group in (losses, figures) if (shown := [picture for picture in group if picture])]
    return Section("curves", "Training", [*blocks, Fold("The training log, epoch by epoch", [_log(history, best)])])


_LOGGED = ("dice_mean", "dice_positive_mean", "iou_mean", "precision", "recall", "f1", "decision_ap", "decision_f1")


def _log(history: list[Json], best: int | None) -> Table:
    """What was logged of each epoch; columns of which nothing is known are left out."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        f"loss_{kind}": (f"{kind} loss", lambda value: words.figure(value, 5)) for kind in LOSSES
    }
    columns |= {key: (words.metric(key), words.figure) for key in _LOGGED}
    columns |= {"threshold": ("threshold", words.probability), "seconds": ("time", words.duration)}
    shown = {key: look for key, look in columns.items() if any(epoch.get(key) is not None for epoch in history)}
    rows = [[str(epoch["epoch"]), *(form(epoch.get(key)) for key, (_, form) in shown.items())] for epoch in history]
    strong = frozenset(k for k, epoch in enumerate(history) if epoch["epoch"] == best)
    header = ["epoch", *(name for name, _ in shown.values())]
    caption = "Losses on training images, figures on validation; the epoch that was kept stands out"
    return Table(header, rows, caption, frozenset(range(len(header))), strong)


def _curve(
    gallery: Gallery,
    history: list[Json],
    name: str,
    series: list[tuple[str, str, str]],
    ylabel: str,
    caption: str,
    best: int | None,
    width: float = style.HALF,
    bounded: bool = True,
) -> Picture | None:
    figure = charts.by_epoch(history, series, ylabel, best, width, bounded)
    return None if figure is None else gallery.figure(figure, name, caption, "half" if width == style.HALF else "third")


def thresholds(run: EvaluatedRun, results: Results, metrics: Json) -> Section:
    """The chosen thresholds, and what every rule would have chosen."""
    chosen, validation = run.winner.thresholds, results.validation
    rule = words.rule(chosen["rule"], chosen["factor"])
    probability, best = charts.best_threshold(validation)
    rows = [
        ["rule", rule],
        ["segmentation threshold", _threshold(chosen, "segmentation")],
        ["Dice on validation", words.mean_std(validation.figures["dice_mean"], validation.figures["dice_std"])],
        ["IoU on validation", words.mean_std(validation.figures["iou_mean"], validation.figures["iou_std"])],
        ["best any threshold does", f"Dice {best:.3f} at {words.probability(probability)}"],
    ]
    if run.has_negatives:
        rows.insert(2, ["decision threshold", _threshold(chosen, "decision")])
    shown = [Table(["", ""], rows, f"Chosen on {results.test.chosen_on}, carried by the winner")]
    record, _ = run.history_record()
    if record is not None and record["rules"]:
        name = words.metric(run.objectives[0]["metric"])
        replayed = [[name, words.figure(value)] for name, value in record["rules"].items()]
        strong = frozenset(k for k, row in enumerate(replayed) if row[0] == rule)
        means = ", means over folds" if run.folds else ""
        caption = f"Every rule on trial {record['trial']}, each at its own best epoch{means}"
        shown.append(Table(["rule", f"{name}, validation"], replayed, caption, frozenset({1}), strong))
    replays = rules.blocks(metrics["rules"], run.winner.epoch, results.test.chosen_on)
    return Section("thresholds", "Thresholds", [Tables(shown), *replays])


def _threshold(thresholds: Json, kind: str) -> str:
    if thresholds[f"{kind}_logit"] is None:
        return words.NONE
    return f"{words.probability(thresholds[f'{kind}_probability'])} (logit {thresholds[f'{kind}_logit']:.4g})"


def images(run: EvaluatedRun, results: Results, gallery: Gallery) -> Section:
    """Failures, and examples from the worst to the best; writes dices/ on the way."""
    values = examples.dice(run.examples)
    order = np.argsort(values, kind="stable")
    defects = [rank for rank, k in enumerate(order) if run.examples.truth[k].any()]
    kind = "examples with a defect" if defects else "examples, none of which has a defect"
    defects = defects or [*range(len(order))]
    everywhere = results.test.selected.truth[:, 0] > 0
    dice = results.test.dice[everywhere if everywhere.any() else slice(None)]
    median = float(np.median(dice))
    middle = min(defects, key=lambda rank: abs(values[order[rank]] - median))
    counted = words.plural(len(dice), "test image") + (" with a defect" if everywhere.any() else "")
    shown = {middle: f"example nearest to the median of all {counted} (Dice {median:.3f})"}
    shown |= {defects[-1]: f"best of the {kind}", defects[0]: f"worst of the {kind}"}
    pictures, every = [], []
    for rank, k in enumerate(order):
        pixels = examples.strip(run.examples, int(k), rank + 1, float(values[k]))
        file = examples.file_name(rank + 1, float(values[k]), run.examples.names[k])
        every.append(gallery.example(pixels, file, run.examples.names[k]))
        if rank in shown:
            caption = f"The {shown[rank]}: {run.examples.names[k]}, Dice {values[k]:.3f}."
            name = "median" if shown[rank].startswith("example") else shown[rank].split()[0]
            pictures.append(Pictures([gallery.image(pixels, f"example-{name}", caption)]))
    text = (
        f"{_how_picked(run, results)} They are sorted by Dice from the worst to the best; dices/ beside this page "
        "holds them one by one. An empty answer to an image without a defect has Dice 1."
    )
    sheet = gallery.image(examples.contact_sheet(run.examples), "contact-sheet", "All examples: rank, Dice, name.")
    worst = failures.blocks(results.test, [run.examples.names[k] for k in order])
    fold = Fold("All of them, with input, truth, probability, mask and overlap", [Pictures(every)])
    return Section("examples", "Example images", [*worst, Text(text), *pictures, Pictures([sheet]), fold])


def _how_picked(run: EvaluatedRun, results: Results) -> str:
    """Examples are no fair sample where not all images are kept."""
    names, every = run.examples.names, results.test.split.names
    if len(names) == len(every):
        return f"The examples are all {words.plural(len(every), 'test image')}."
    named = {every[n] for _, n in failures.find(results.test).shown()}
    picked = len(named & set(names))
    return (
        f"The examples are {len(names):,} of the {len(every):,} test images and no fair sample: {picked:,} of them "
        "were picked as failures that the table names, the others are the best ones and some spread over all ranks."
    )
