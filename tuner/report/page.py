"""The page in order, and the parts that say what was done: head, network, data, parameters."""

from __future__ import annotations

from pathlib import PurePosixPath

from model.config import REFERENCES, RULES
from tuner.report import architecture, head, masks_page, trust, winner_page, words
from tuner.report.gallery import (
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
from tuner.report.inputs import Candidate, EvaluatedRun, Json, Run
from tuner.report.search_page import provenance, search
from tuner.report.tables import Results

SPLITS = ("train", "validation", "test")


def build(run: Run, results: Results | None, metrics: Json, gallery: Gallery) -> Page:
    """Draws all pictures into the gallery on the way. `results` are there where `run` is evaluated."""
    count = words.plural(len(run.records), "trial")
    if isinstance(run, EvaluatedRun):
        assert results is not None
        kind = "nearest to its constraints" if run.winner.is_beyond else "best"
        title, subject = f"the {kind} of {count}", f"winner {run.winner.trial}"
        sections = _evaluated(run, results, metrics, gallery)
    else:
        title, subject = f"{count}, none evaluated", head.state(run)
        sections = _unevaluated(run, metrics, gallery)
    return Page(
        title=f"{data_name(run)}: {title}",
        subtitle=f"run {run.facts['name']} · {run.facts['created'][:10]} · {subject}",
        sections=sections,
    )


def data_name(run: Run) -> str:
    """Last part of the data path."""
    return PurePosixPath(run.facts["data_path"]).name or run.facts["name"]


def _evaluated(run: EvaluatedRun, results: Results, metrics: Json, gallery: Gallery) -> list[Section]:
    sections = [
        head.evaluated(run, results, metrics, gallery),
        _network(run, gallery),
        _data(run),
        _parameters(run, run.winner),
        winner_page.test(results, metrics, gallery),
        winner_page.curves(run, gallery),
        winner_page.thresholds(run, results, metrics),
        winner_page.images(run, results, gallery),
        *trust.trust(run, results, gallery),
        search(run, metrics, gallery),
        *masks_page.section(run, metrics["masks"], gallery),
        provenance(run),
    ]
    if results.test.is_stamped:
        return [stamped(one, head.STAMP) if one.anchor in ("test", "examples", "trust") else one for one in sections]
    return sections


def _unevaluated(run: Run, metrics: Json, gallery: Gallery) -> list[Section]:
    """What is known before the test split was opened: all but the winner's answers."""
    chosen = run.chosen
    of_best = [] if chosen is None else [_parameters(run, chosen), winner_page.curves(run, gallery)]
    of_best += trust.trust(run, None, gallery)
    of_search = [search(run, metrics, gallery), *masks_page.section(run, metrics["masks"], gallery)]
    return [head.unevaluated(run, metrics), _data(run), *of_best, *of_search, provenance(run)]


def _network(run: EvaluatedRun, gallery: Gallery) -> Section:
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
    chosen = run.chosen
    kept = "all" if chosen is None else chosen.config["num_segmented"]
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
        else f"The best trial trains with the masks of {kept} positive images; the others give only their label."
    )
    if run.folds:
        text += f" Training and validation are one pool, which is dealt into {run.folds} folds by group."
    columns = ["split", "images", "positive", "negative", "masks used", "groups"]
    caption = "Samples; images of one group never lie in two splits"
    split_table = Table(columns, rows, caption, frozenset(range(1, 6)), label="data")
    input_table = Table(names, [facts], "What the network sees")
    return Section("data", "Data", [Tables([input_table, split_table]), Text(text)])


def _parameters(run: Run, chosen: Candidate) -> Section:
    rows: list[list[str]] = []
    strong: set[int] = set()
    for name, rule in RULES.items():
        mark = "searched" if name in run.searched else ""
        if mark:
            strong.add(len(rows))
        settings = [head.setting(candidate, name) for candidate in (chosen, run.compared_with)]
        rows.append([name, *settings, mark, rule.doc])
    table = Table(
        ["field", "winner" if isinstance(run, EvaluatedRun) else "best", "baseline", "", "what it is"],
        rows,
        "All fields of the run",
        strong=frozenset(strong),
    )
    return Section("parameters", "Run parameters", [table, *map(Text, REFERENCES)])
