"""The page in order, and its parts on the winner: head, network, data, parameters, test, curves, thresholds, images."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np

from model.config import RULES
from tuner.report import architecture, charts, examples, style, tables, words
from tuner.report.gallery import Block, Card, Cards, Gallery, Page, Picture, Pictures, Section, Table, Text, save
from tuner.report.inputs import Json, Run
from tuner.report.search_page import provenance, search
from tuner.report.tables import Judged, Results

SPLITS = ("train", "validation", "test")


def build(run: Run, results: Results, metrics: Json, gallery: Gallery) -> Page:
    """Draws all pictures into the gallery on the way."""
    return Page(
        title=f"{data_name(run)}: the best of {words.plural(len(run.records), 'trial')}",
        subtitle=f"run {run.facts['name']} · {run.facts['created'][:10]} · winner {run.winner.trial}",
        sections=[
            _head(run, results, metrics, gallery),
            _network(run, gallery),
            _data(run),
            _parameters(run),
            _test(results, metrics, gallery),
            _curves(run, gallery),
            _thresholds(run, results, gallery),
            _examples(run, gallery),
            search(run, metrics, gallery),
            provenance(run),
        ],
    )


def data_name(run: Run) -> str:
    """Last part of the data path."""
    return PurePosixPath(run.facts["data_path"]).name or run.facts["name"]


def _head(run: Run, results: Results, metrics: Json, gallery: Gallery) -> Section:
    rows = examples.best_rows(run.examples, 4)
    strip = gallery.image(
        examples.headline_strip(run.examples, rows),
        "best-examples",
        "Test images with a defect that the winner segments best: input above, its answer against the truth below.",
    )
    blocks: list[Block] = [Cards(_cards(run, metrics)), Text(verdict(run, results)), Pictures([strip])]
    if run.searched:
        blocks.append(_best_configuration(run))
    return Section("top", "", blocks)


def _cards(run: Run, metrics: Json) -> list[Card]:
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


def verdict(run: Run, results: Results) -> str:
    """Winner against baseline in one sentence, and what the data did not allow."""
    text = _comparison(run, results)
    if not run.has_negatives:
        text += (
            " The data have no images without a defect, so the decision was not trained: there is no confusion "
            "matrix, no decision AP and no decision AUC."
        )
    return text


def _comparison(run: Run, results: Results) -> str:
    if run.is_baseline:
        return "The search found nothing better than the baseline: the winner is the baseline."
    gain = tables.difference(results)
    if gain is None:
        return (
            "There is no baseline to compare with."
            if run.baseline is None
            else "No positive test images to compare on."
        )
    images = words.plural(gain.images, "positive test image")
    text = (
        f"On the same {images} the winner's Dice is {abs(gain.mean):.3f} {'higher' if gain.mean >= 0 else 'lower'} "
        f"than the baseline's on average"
    )
    if gain.interval is None:
        return text + "; the images come from one group, so no interval can be given."
    low, high = gain.interval
    text += (
        f" (95 % interval of the difference {low:+.3f} to {high:+.3f}; higher on {gain.won:,}, lower on {gain.lost:,})"
    )
    if low > 0:
        return text + ", which chance in the choice of test images does not explain."
    if high < 0:
        return text + ": what looked best on validation is worse here."
    return text + ": the interval holds zero, so the test split does not tell the two apart."


def _best_configuration(run: Run) -> Table:
    rows = []
    for name, parameter in run.searched.items():
        rows.append(
            [
                name,
                words.setting(run.winner.config.get(name)),
                _baseline_setting(run, name),
                words.search_range(parameter),
            ]
        )
    return Table(["parameter", "best", "baseline", "searched"], rows, "The best configuration among what was searched")


def _baseline_setting(run: Run, name: str) -> str:
    return words.NONE if run.baseline is None else words.setting(run.baseline.config.get(name))


def _network(run: Run, gallery: Gallery) -> Section:
    original, used = run.architecture["original"], run.architecture["used"]
    caption = (
        "{} {} weights. A bar is a stage, the coloured part grows with the logarithm of its channels; a row is a size "
        "of map in px; dotted lines join maps of one size."
    )

    def draw(stages: list[Json], name: str, title: str) -> Picture:
        weights = words.parameters(sum(stage["parameters"] for stage in stages))
        return gallery.figure(architecture.draw(stages), name, caption.format(title, weights), "full")

    name = run.winner.config["architecture"]
    if original == used:
        text = f"The winner uses the original network ({name}) as it is."
    else:
        text = f"The winner uses {name} at width {words.setting(run.winner.config['width'])}."
    pictures = [draw(original, "architecture-original", "The original network,")]
    pictures.append(draw(used, "architecture-used", f"The network used ({name}),"))
    return Section("network", "Network", [Text(text), *(Pictures([picture]) for picture in pictures)])


def _data(run: Run) -> Section:
    data = run.data
    rows = []
    for split in SPLITS:
        counts, groups = data[split], data["groups"][split]
        total = counts["positive"] + counts["negative"]
        rows.append(
            [split, *(f"{n:,}" for n in (total, counts["positive"], counts["negative"], counts["segmented"], groups))]
        )
    facts = [
        ["data set", data_name(run)],
        ["layout", str(data["layout"])],
        ["channels", str(data["channels"])],
        ["height", f"{data['height']} px"],
        ["width", f"{data['width']} px"],
    ]
    kept = run.winner.config["num_segmented"]
    text = (
        "Every positive training image that has a mask keeps it."
        if kept == "all"
        else f"The winner trains with the masks of {kept} positive images; the others give only their label."
    )
    columns = ["split", "images", "positive", "negative", "masks used", "groups"]
    split_table = Table(columns, rows, "Samples; images of one group never lie in two splits", frozenset(range(1, 6)))
    return Section("data", "Data", [Table(["input", ""], facts), split_table, Text(text)])


def _parameters(run: Run) -> Section:
    rows, strong = [], set()
    for name, rule in RULES.items():
        mark = "searched" if name in run.searched else ""
        if mark:
            strong.add(len(rows))
        rows.append([name, words.setting(run.winner.config.get(name)), _baseline_setting(run, name), mark, rule.doc])
    table = Table(
        ["field", "winner", "baseline", "", "what it is"], rows, "All fields of the run", strong=frozenset(strong)
    )
    return Section("parameters", "Run parameters", [table])


def _test(results: Results, metrics: Json, gallery: Gallery) -> Section:
    test, baseline = results.test, results.baseline_test
    pictures: list[Picture] = []
    blocks: list[Block] = [_test_table(metrics)]
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
            gallery.figure(charts.roc(test, baseline), "roc", "ROC of the decision on test images.", "third")
        )
        caption = "Precision and recall of the decision on test images."
        pictures.append(
            gallery.figure(charts.image_precision_recall(test, baseline), "precision-recall", caption, "third")
        )
    if pictures:
        blocks.append(Pictures(pictures))
    blocks.append(Pictures(_pixel_pictures(results, gallery)))
    blocks.append(Pictures(_dice_pictures(test, baseline, gallery)))
    if (by_source := _by_source(test)) is not None:
        blocks.append(by_source)
    return Section("test", "Test", blocks)


def _test_table(metrics: Json) -> Table:
    names = {"tp": "true positives", "fp": "false positives", "fn": "false negatives", "tn": "true negatives"}
    rows = []
    for key in tables.TEST_KEYS:
        if key.endswith("_std") or key == "threshold":
            continue
        row = [names.get(key, words.metric(key))]
        for judged in (metrics["test"], metrics["baseline"]):
            spread = key.replace("_mean", "_std")
            value = (
                words.mean_std(judged[key], judged[spread])
                if key in ("dice_mean", "iou_mean")
                else words.figure(judged[key])
            )
            row += [value, words.interval(judged["ci95"].get(key))]
        rows.append(row)
    caption = "Test split, at the thresholds chosen on validation; ± is the standard deviation over images"
    return Table(
        ["figure", "winner", "95 % interval", "baseline", "95 % interval"], rows, caption, frozenset({1, 2, 3, 4})
    )


def _pixel_pictures(results: Results, gallery: Gallery) -> list[Picture]:
    validation, test = results.validation, results.test
    return [
        gallery.figure(
            charts.pixel_precision_recall(validation, test),
            "pixel-precision-recall",
            "Precision and recall over all pixels of a split.",
        ),
        gallery.figure(
            charts.dice_by_threshold(validation, test),
            "dice-by-threshold",
            "Mean Dice against the segmentation threshold.",
        ),
    ]


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


def _by_source(test: Judged) -> Table | None:
    """Figures by where the images come from, if there are several sources and not one an image."""
    sources = np.array(test.split.sources)
    names = np.unique(sources)
    if not 1 < len(names) <= max(2, min(30, len(sources) // 2)):
        return None
    rows = []
    for name in names:
        here = np.flatnonzero(sources == name)
        values = test.of_rows(here)
        shown = (tables.number(values[key]) for key in ("dice_positive_mean", "dice_mean", "iou_mean", "f1"))
        rows.append([str(name), f"{len(here):,}", f"{test.split.labels[here].sum():,}", *map(words.figure, shown)])
    header = ["source", "images", "positive", "Dice, positive", "Dice, all", "IoU, all", "pixel F1"]
    return Table(header, rows, "Test figures by source of the images", frozenset(range(1, 7)))


def _curves(run: Run, gallery: Gallery) -> Section:
    record, own = run.history_record()
    if record is None or not record["history"]:
        return Section("curves", "Training", [Text("No curves by epoch were kept for the winner's configuration.")])
    history, best = record["history"], record["best_epoch"]
    blocks: list[Block] = []
    if not own:
        blocks.append(
            Text(
                f"The winner is a repeat with another seed; these are the curves of trial {record['trial']}, which has "
                "the same configuration."
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
        for kind, colour in (("segmentation", style.BLUE), ("decision", style.ORANGE), ("total", style.INK))
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
    return Section("curves", "Training", blocks)


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


def _thresholds(run: Run, results: Results, gallery: Gallery) -> Section:
    thresholds, validation = run.winner.thresholds, results.validation
    rule = f"{thresholds['rule']}/{thresholds['factor']}" if thresholds["rule"] == "pr_curve" else thresholds["rule"]
    probability, best = charts.best_threshold(validation)
    rows = [
        ["rule", rule],
        ["segmentation threshold", _threshold(thresholds, "segmentation")],
        ["Dice on validation", words.mean_std(validation.figures["dice_mean"], validation.figures["dice_std"])],
        ["IoU on validation", words.mean_std(validation.figures["iou_mean"], validation.figures["iou_std"])],
        ["best any threshold does", f"Dice {best:.3f} at {words.probability(probability)}"],
    ]
    if run.has_negatives:
        rows.insert(2, ["decision threshold", _threshold(thresholds, "decision")])
    blocks: list[Block] = [Table(["on validation", ""], rows, "The thresholds that the winner carries")]
    record, _ = run.history_record()
    if record is not None and record["rules"]:
        name = words.metric(run.objectives[0]["metric"])
        replayed = [[name, _any_figure(value)] for name, value in record["rules"].items()]
        strong = frozenset(k for k, row in enumerate(replayed) if row[0] == rule)
        blocks.append(
            Table(
                ["rule", name],
                replayed,
                f"Every rule replayed on the same network (trial {record['trial']}, validation)",
                frozenset({1}),
                strong,
            )
        )
    return Section("thresholds", "Thresholds", blocks)


def _threshold(thresholds: Json, kind: str) -> str:
    if thresholds[f"{kind}_logit"] is None:
        return words.NONE
    return f"{words.probability(thresholds[f'{kind}_probability'])} (logit {thresholds[f'{kind}_logit']:.4g})"


def _any_figure(value: Any) -> str:
    return ", ".join(map(words.figure, value)) if isinstance(value, list) else words.figure(value)


def _examples(run: Run, gallery: Gallery) -> Section:
    values = examples.dice(run.examples)
    order = np.argsort(values, kind="stable")
    shown = {0: "worst", len(order) // 2: "median", len(order) - 1: "best"}
    pictures = []
    for rank, k in enumerate(order):
        pixels = examples.strip(run.examples, int(k), rank + 1, float(values[k]))
        save(gallery.folder / "dices" / examples.file_name(rank + 1, float(values[k]), run.examples.names[k]), pixels)
        if rank in shown:
            caption = f"The {shown[rank]} of the examples: {run.examples.names[k]}, Dice {values[k]:.3f}."
            pictures.append(Pictures([gallery.image(pixels, f"example-{shown[rank]}", caption)]))
    text = (
        f"{words.plural(len(order), 'test image')}, sorted by Dice from the worst to the best. The folder dices/ beside "
        "this page holds one picture for each, in this order. An empty answer to an image without a defect has Dice 1."
    )
    sheet = gallery.image(examples.contact_sheet(run.examples), "contact-sheet", "All examples: rank, Dice, name.")
    return Section("examples", "Example images", [Text(text), *pictures, Pictures([sheet])])
