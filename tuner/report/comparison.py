"""Several searches side by side, each from its run directory alone. Every one is compared with the first.

Test figures are paired on the test images that two runs share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.arrays import Array, Ints
from model.intervals import MIN_GROUPS, Interval, Ratio, contributing, difference_interval
from tuner import records
from tuner.report import comparison_charts, inputs, tables, words
from tuner.report.gallery import Block, Gallery, Page, Pictures, Section, Table, Text
from tuner.report.inputs import EvaluatedRun, Json, Run
from tuner.report.tables import Judged, Results

FIGURES = ("dice_mean", "dice_positive_mean", "iou_mean", "precision", "recall", "f1", "two_pixel_f1")
"""Those that are ratios of sums over images, and so have a paired difference."""
_OTHERS = ("decision_ap", "decision_auc", "decision_f1")
_DATA = ("width", "height", "channels", "train", "validation", "test")


@dataclass(frozen=True)
class Search:
    """A run under the name by which it is told apart."""

    name: str
    run: Run

    @cached_property
    def results(self) -> Results | None:
        return tables.results(self.run) if isinstance(self.run, EvaluatedRun) else None

    @cached_property
    def metrics(self) -> Json:
        return tables.metrics(self.run, self.results)


@dataclass(frozen=True)
class Difference:
    """A search minus the first one, by figure: (value, interval), on shared test images."""

    images: int
    groups: int
    figures: dict[str, tuple[float, Interval | None]]


def read(directories: Sequence[Path]) -> list[Search]:
    """At least two runs. ValueError for fewer, for one given twice, and for what is no run."""
    resolved = [directory.resolve() for directory in directories]
    if len(resolved) < 2 or len(set(resolved)) < len(resolved):
        raise ValueError(f"a comparison needs two runs or more, each once; found {', '.join(map(str, directories))}")
    runs = [inputs.read(directory) for directory in directories]
    given = Counter(run.facts["name"] for run in runs)
    return [
        Search(run.facts["name"] if given[run.facts["name"]] == 1 else str(directory), run)
        for directory, run in zip(directories, runs, strict=True)
    ]


def difference(search: Search, first: Search) -> Difference | None:
    """None where one is not evaluated, or where they share no test image."""
    if search.results is None or first.results is None:
        return None
    ours, theirs = search.results.test, first.results.test
    mine, other = _shared(ours, theirs)
    if not len(mine):
        return None
    groups = ours.groups[mine]
    figures: dict[str, tuple[float, Interval | None]] = {}
    for key in FIGURES:
        a, b = (_rows(judged.ratios[key][0], rows) for judged, rows in ((ours, mine), (theirs, other)))
        if a.denominator_N.sum() and b.denominator_N.sum():
            figures[key] = a.value() - b.value(), difference_interval(a, b, groups)
    return Difference(len(mine), contributing(np.ones(len(mine)), groups), figures)


def _shared(ours: Judged, theirs: Judged) -> tuple[Ints, Ints]:
    """Rows of the images that both have, in the order of ours: of one name and label and, where inputs have one size,
    one mask by its number of px. Names alone are not enough: numbered images are in many sets."""
    ours_of, theirs_of = ours.selected, theirs.selected
    same_size = set(ours_of.pixels[:, 0].tolist()) == set(theirs_of.pixels[:, 0].tolist())

    def keys(judged: Judged) -> list[tuple[str, bool, int]]:
        truth = judged.selected.truth[:, 0] if same_size else np.zeros(len(judged.split), np.int64)
        return list(zip(judged.split.names, map(bool, judged.split.labels), map(int, truth), strict=True))

    there = {key: row for row, key in enumerate(keys(theirs))}
    pairs = [(row, there[key]) for row, key in enumerate(keys(ours)) if key in there]
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _rows(ratio: Ratio, rows: Ints) -> Ratio:
    return Ratio(np.asarray(ratio.numerator_N)[rows], np.asarray(ratio.denominator_N)[rows])


def as_json(searches: Sequence[Search]) -> Json:
    """For programs: the metrics.json of each, and the differences to the first."""
    return {
        "schema": 1,
        "runs": [{"name": search.name, "metrics": search.metrics} for search in searches],
        "difference": [_difference_as_json(search, searches[0]) for search in searches[1:]],
    }


def _difference_as_json(search: Search, first: Search) -> Json:
    found = difference(search, first) or Difference(0, 0, {})
    figures = {key: {"value": value, "ci95": interval} for key, (value, interval) in found.figures.items()}
    return {"run": search.name, "minus": first.name, "images": found.images, "groups": found.groups, "figures": figures}


def build(searches: Sequence[Search], gallery: Gallery | None = None) -> Page:
    """The page; without a gallery there are no pictures."""
    blocks: dict[str, list[Block]] = {
        "Test": [Text(_caution(searches)), _test(searches), _differences(searches)],
        "Searches": [_search(searches)],
        "Best configurations": [_configurations(searches)],
        "Data": [_data(searches)],
    }
    if gallery is not None:
        blocks["Searches"] += _pictures(searches, gallery)
    names = " and ".join(search.name for search in searches[:2]) if len(searches) == 2 else f"{len(searches)} searches"
    return Page(
        title=f"{names}, side by side",
        subtitle=f"differences are to {searches[0].name}",
        sections=[Section(title.lower().replace(" ", "-"), title, found) for title, found in blocks.items()],
    )


def _caution(searches: Sequence[Search]) -> str:
    """What must be known before the figures are compared."""
    text = "Each search is shown by its own winner. An interval holds for its comparison alone: of twenty, one misses."
    sizes = {(search.run.data["height"], search.run.data["width"]) for search in searches}
    if len(sizes) > 1:
        text += (
            " The inputs have different sizes, and each mask is judged at the size of its own input: thin cracks are "
            "harder to hit at a larger one. Images are then matched by name and label alone."
        )
    if len({search.run.data["fingerprint"] for search in searches}) > 1:
        text += " The data are not the same: differences are of the test images that two runs share, if they share any."
    if len({search.metrics["thresholds_chosen_on"] for search in searches}) > 1 and any(
        search.metrics["evaluated"] for search in searches
    ):
        text += " Not all are evaluated, or not in the same way."
    for search in searches:
        if search.run.chosen and search.run.chosen.is_beyond:
            text += f" {search.name} does not meet its constraints: {records.beyond(search.run.chosen.violations)}."
    return text


def _columns(searches: Sequence[Search]) -> list[str]:
    return ["", *(search.name for search in searches)]


def _right(searches: Sequence[Search]) -> frozenset[int]:
    return frozenset(range(1, len(searches) + 1))


def _test(searches: Sequence[Search]) -> Table:
    def cell(search: Search, key: str, role: str) -> str:
        figures = search.metrics[role]
        interval = figures["ci95"].get(key)
        return words.figure(figures[key]) + (f" ({words.interval(interval)})" if interval else "")

    rows = [[words.metric(key), *(cell(one, key, "test") for one in searches)] for key in (*FIGURES, *_OTHERS)]
    rows.append(["of its baseline: Dice, all images", *(cell(one, "dice_mean", "baseline") for one in searches)])
    images = [str(len(one.results.test.split)) if one.results else "not evaluated" for one in searches]
    rows.insert(0, ["test images", *images])
    return Table(_columns(searches), rows, "Winners on test, with 95 % intervals", _right(searches))


def _differences(searches: Sequence[Search]) -> Block:
    first = searches[0]
    found = {search.name: difference(search, first) for search in searches[1:]}
    shared = {name: one for name, one in found.items() if one is not None}
    if not shared:
        return Text(f"None shares evaluated test images with {first.name}, so there is no paired difference to it.")
    rows = [
        ["shared test images", *(f"{one.images:,} in {words.plural(one.groups, 'group')}" for one in shared.values())]
    ]
    for key in FIGURES:
        cells = [words.difference(*one.figures[key]) if key in one.figures else words.NONE for one in shared.values()]
        rows.append([words.metric(key), *cells])
    caption = f"Paired difference to {first.name} on shared test images, with 95 % intervals"
    if any(one.groups < MIN_GROUPS for one in shared.values()):
        caption += f"; none below {MIN_GROUPS} groups"
    return Table(["", *shared], rows, caption, frozenset(range(1, len(shared) + 1)))


def _search(searches: Sequence[Search]) -> Table:
    def row(name: str, value: Any) -> list[str]:
        return [name, *(str(value(search)) for search in searches)]

    def part(search: Search, *keys: str) -> str:
        value: Any = search.run.space
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else value
        return words.setting(value)

    rows = [
        row("objective", lambda s: ", ".join(words.metric(one["metric"]) for one in s.run.objectives)),
        row("constraints", lambda s: "; ".join(map(words.bound, s.run.constraints)) or "none"),
        row("winner", lambda s: s.run.chosen.trial if s.run.chosen else words.NONE),
        row("its value on validation", lambda s: words.figure(s.run.chosen.value, 4) if s.run.chosen else words.NONE),
        row("sampler", lambda s: part(s, "sampler", "name")),
        row("scheduler", lambda s: part(s, "scheduler", "name")),
        *(
            row(words.STATUS_NAMES.get(key, key), lambda s, key=key: f"{s.metrics['search'][key]:,}")
            for key in ("trials", *tables.STATUSES)
        ),
        row("time from start to end", lambda s: words.duration(s.metrics["search"]["wall_seconds"])),
        row("time on devices", lambda s: words.duration(s.metrics["search"]["device_seconds"])),
        row("processor", lambda s: s.run.facts["hardware"]["cpu"]),
        row("GPUs", lambda s: ", ".join(s.run.facts["hardware"]["gpus"]) or "none"),
        row("test split opened", lambda s: words.plural(s.metrics["test_openings"], "time")),
    ]
    return Table(_columns(searches), rows, "How they searched", _right(searches))


def _configurations(searches: Sequence[Search]) -> Table:
    """Every field that some search looked for, or in which the winners differ."""
    configs = [search.run.chosen.config if search.run.chosen else {} for search in searches]
    fields = dict.fromkeys(name for config in configs for name in config)
    shown = [
        name
        for name in fields
        if any(name in search.run.searched for search in searches) or len({str(c.get(name)) for c in configs if c}) > 1
    ]
    strong = frozenset(k for k, name in enumerate(shown) if len({str(c.get(name)) for c in configs if c}) > 1)
    rows = [[name, *(words.setting(config.get(name)) for config in configs)] for name in shown]
    return Table(_columns(searches), rows, "What was searched, and where winners differ", strong=strong)


def _data(searches: Sequence[Search]) -> Table:
    def cell(search: Search, key: str) -> str:
        value = search.run.data[key]
        return f"{value['positive']:,} + {value['negative']:,}" if isinstance(value, dict) else str(value)

    rows = [[key, *(cell(search, key) for search in searches)] for key in _DATA]
    rows.append(["fingerprint", *(search.run.data["fingerprint"][:12] for search in searches)])
    return Table(_columns(searches), rows, "Data: images with a defect + without", _right(searches))


def _pictures(searches: Sequence[Search], gallery: Gallery) -> list[Block]:
    named: list[tuple[str, Run]] = [(search.name, search.run) for search in searches]
    dice: list[tuple[str, Array]] = [
        (search.name, search.results.test.dice[search.results.test.split.labels])
        for search in searches
        if search.results is not None and search.results.test.split.labels.any()
    ]
    pictures = [
        gallery.figure(
            comparison_charts.best_by_device_time(named),
            "best-so-far",
            "Best so far on validation against device time.",
        )
    ]
    if dice:
        caption = "Share of positive test images with at most so much Dice: further right is better."
        pictures.append(gallery.figure(comparison_charts.dice_shares(dice), "dice-shares", caption))
    return [Pictures(pictures)]
