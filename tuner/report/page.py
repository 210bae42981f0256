"""The page in order, and the parts that say what was done: head, network, data, parameters."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from model.config import REFERENCES, RULES
from tuner.report import architecture, examples, tables, winner_page, words
from tuner.report.gallery import Block, Card, Cards, Gallery, Page, Picture, Pictures, Section, Table, Tables, Text
from tuner.report.inputs import Json, Run
from tuner.report.search_page import provenance, search
from tuner.report.tables import Results

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
            winner_page.test(results, metrics, gallery),
            winner_page.curves(run, gallery),
            winner_page.thresholds(run, results),
            winner_page.images(run, gallery),
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
        "Test images with a defect that the winner segments best: input, and the answer laid over it.",
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
    if run.baseline is None:
        return "There is no baseline to compare with."
    labels = results.test.split.labels
    sentences = [_difference("test image", tables.difference(results, np.ones_like(labels)))]
    if not labels.all():
        sentences.append(_difference("test image with a defect", tables.difference(results, labels)))
    return " ".join(sentences)


def _difference(images: str, gain: tables.Difference | None) -> str:
    """Winner against baseline on some images, in a sentence."""
    if gain is None:
        return f"There is no {images} to compare on."
    counted = words.plural(gain.images, "test image") + images.removeprefix("test image")
    text = (
        f"On the same {counted} the winner's Dice is {abs(gain.mean):.3f} {'higher' if gain.mean >= 0 else 'lower'} "
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
        return text + ": there the winner is worse."
    return text + ": the interval holds zero, so these images do not tell the two apart."


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
        "of map in px; dotted lines are skips."
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
    names = ["data set", "layout", "channels", "height", "width"]
    facts = [data_name(run), str(data["layout"]), str(data["channels"]), f"{data['height']} px", f"{data['width']} px"]
    kept = run.winner.config["num_segmented"]
    text = (
        "Every positive training image that has a mask keeps it."
        if kept == "all"
        else f"The winner trains with the masks of {kept} positive images; the others give only their label."
    )
    columns = ["split", "images", "positive", "negative", "masks used", "groups"]
    split_table = Table(columns, rows, "Samples; images of one group never lie in two splits", frozenset(range(1, 6)))
    input_table = Table(names, [facts], "What the network sees")
    return Section("data", "Data", [Tables([input_table, split_table]), Text(text)])


def _parameters(run: Run) -> Section:
    rows: list[list[str]] = []
    strong: set[int] = set()
    for name, rule in RULES.items():
        mark = "searched" if name in run.searched else ""
        if mark:
            strong.add(len(rows))
        rows.append([name, words.setting(run.winner.config.get(name)), _baseline_setting(run, name), mark, rule.doc])
    table = Table(
        ["field", "winner", "baseline", "", "what it is"], rows, "All fields of the run", strong=frozenset(strong)
    )
    return Section("parameters", "Run parameters", [table, *map(Text, REFERENCES)])
