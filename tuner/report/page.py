"""The page in order, and the parts that say what was done: head, network, data, parameters."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from model.arrays import Floats
from model.config import REFERENCES, RULES
from tuner import records
from tuner.report import architecture, examples, tables, winner_page, words
from tuner.report.gallery import (
    Block,
    Card,
    Cards,
    Gallery,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tables,
    Text,
    stamped,
)
from tuner.report.inputs import Json, Run
from tuner.report.search_page import provenance, search
from tuner.report.tables import Results

SPLITS = ("train", "validation", "test")


STAMP = "thresholds chosen on test"
BEYOND = "constraints not met"


def build(run: Run, results: Results, metrics: Json, gallery: Gallery) -> Page:
    """Draws all pictures into the gallery on the way."""
    sections = [
        _head(run, results, metrics, gallery),
        _network(run, gallery),
        _data(run),
        _parameters(run),
        winner_page.test(results, metrics, gallery),
        winner_page.curves(run, gallery),
        winner_page.thresholds(run, results, metrics),
        winner_page.images(run, results, gallery),
        search(run, metrics, gallery),
        provenance(run),
    ]
    if results.test.is_stamped:
        sections = [
            stamped(section, STAMP) if section.anchor in ("test", "examples") else section for section in sections
        ]
    kind = "nearest to its constraints" if run.winner.is_beyond else "best"
    return Page(
        title=f"{data_name(run)}: the {kind} of {words.plural(len(run.records), 'trial')}",
        subtitle=f"run {run.facts['name']} · {run.facts['created'][:10]} · winner {run.winner.trial}",
        sections=sections,
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
    head = Section("top", "", blocks)
    if results.test.is_stamped:
        head = stamped(head, STAMP)
    if run.winner.is_beyond:
        head = stamped(head, BEYOND)
    return Section("top", "", [*head.blocks, *([_best_configuration(run)] if run.searched else [])])


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


def _constraints_first(run: Run) -> str:
    """What must be known before the winner is: that it, or the baseline, is not what was asked for."""
    if run.winner.is_beyond:
        return (
            f"No completed trial meets the constraints. Shown is the one that is least beyond them on validation: "
            f"{records.beyond(run.winner.violations)}. "
        )
    if run.baseline is not None and run.baseline.is_beyond:
        return f"The baseline does not meet the constraints: {records.beyond(run.baseline.violations)}. "
    return ""


def _comparison(run: Run, results: Results) -> str:
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
    caption = "The best configuration among what was searched"
    return Table(["parameter", "best", "baseline", "searched"], rows, caption, label="configuration")


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
    kept = run.winner.config["num_segmented"]
    for split in SPLITS:
        counts, groups = data[split], data["groups"][split]
        total = counts["positive"] + counts["negative"]
        masks = counts["segmented"] if split != "train" or kept == "all" else kept
        rows.append([split, *(f"{n:,}" for n in (total, counts["positive"], counts["negative"], masks, groups))])
    names = ["data set", "layout", "channels", "height", "width"]
    facts = [data_name(run), str(data["layout"]), str(data["channels"]), f"{data['height']} px", f"{data['width']} px"]
    text = (
        "Every positive training image that has a mask keeps it."
        if kept == "all"
        else f"The winner trains with the masks of {kept} positive images; the others give only their label."
    )
    columns = ["split", "images", "positive", "negative", "masks used", "groups"]
    caption = "Samples; images of one group never lie in two splits"
    split_table = Table(columns, rows, caption, frozenset(range(1, 6)), label="data")
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
