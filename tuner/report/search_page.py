"""The parts of the page on the search itself: how it went, and where everything comes from."""

from __future__ import annotations

from collections import defaultdict

from model.metrics import METRICS
from tuner import records
from tuner.report import search_charts, words
from tuner.report.gallery import Block, Code, Gallery, Picture, Pictures, Section, Table, Tables, Text
from tuner.report.inputs import Candidate, Json, Run
from tuner.report.tables import STATUSES, best_first, objective

TOP = 10

OTHER_DEFINITIONS = (
    ("hits, predicted, truth", "pixels of an image in both, in the predicted mask, in the mask as drawn"),
    ("truth", "the masks as drawn, never dilated, at the network's input size"),
    ("threshold", "a pixel or an image is a defect when its score is at least the threshold"),
    (
        "95 % interval",
        "over groups of images, none below 20: studentized bootstrap for means, pooled ratios and paired differences; "
        "Clopper-Pearson with an effective number of images for the decision's rates; Newcombe 2006 for its AUC; "
        "binomial among the positives for its AP; jackknife for pixel AP and ODS",
    ),
)


def search(run: Run, metrics: Json, gallery: Gallery) -> Section:
    """Progress, states, best trials, parameters, time."""
    if not run.records:
        return Section("search", "Search", [Text("The run directory holds no records of trials.")])
    blocks: list[Block] = []
    if len(run.objectives) > 1:
        names = " and ".join(words.metric(objective["metric"]) for objective in run.objectives)
        blocks.append(
            Text(
                f"The search had two objectives, {names}. The winner is the trial with the best of the first; the "
                "other charts show that one."
            )
        )
        blocks += _front(run, metrics["front"], gallery)
    if run.constraints:
        blocks.append(_constraints(run))
    blocks.append(Pictures([_progress(run, gallery, against) for against in ("number", "time")]))
    blocks += [_top(run), Tables([_states(run, metrics), _time(run, metrics)])]
    if (reasons := _reasons(run)) is not None:
        blocks.append(reasons)
    if slices := _slices(run, gallery):
        blocks.append(Pictures(slices))
    if (figure := search_charts.timeline(run)) is not None:
        blocks.append(
            Pictures(
                [
                    gallery.figure(
                        figure,
                        "timeline",
                        "Each trial from its first start to its end; a held or interrupted one waited in between.",
                        "full",
                    )
                ]
            )
        )
    return Section("search", "Search", blocks)


def _front(run: Run, points: list[Json], gallery: Gallery) -> list[Block]:
    """The Pareto front."""
    caption = "What each cost buys: no other completed trial is as good for less. Numbers are those of the trials."
    picture = gallery.figure(search_charts.front(run, points), "pareto-front", caption, "full")
    names = list(run.searched)
    rows = [
        [point["trial"], words.figure(point["values"][0], 4), f"{point['values'][1]:,.6g}"]
        + [words.setting(point["params"].get(name)) for name in names]
        for point in points
    ]
    header = ["trial", *(words.metric(one["metric"]) for one in run.objectives), *names]
    strong = frozenset(n for n, point in enumerate(points) if run.chosen and point["trial"] == run.chosen.trial)
    return [Pictures([picture]), Table(header, rows, "The Pareto front on validation", frozenset({1, 2}), strong)]


def _constraints(run: Run) -> Table:
    """What was asked, and how winner and baseline stand to it."""

    def stands(candidate: Candidate | None, metric: str) -> str:
        by = None if candidate is None or candidate.violations is None else candidate.violations[metric]
        return words.NONE if by is None else f"{by:.3g} beyond" if by else "met"

    rows = [
        [words.bound(one), stands(run.chosen, one["metric"]), stands(run.compared_with, one["metric"])]
        for one in run.constraints
    ]
    met = sum(r["status"] == "completed" and records.is_feasible(r) for r in run.records)
    completed = sum(r["status"] == "completed" for r in run.records)
    caption = f"Constraints on validation; {met} of {words.plural(completed, 'completed trial')} meet all"
    return Table(["constraint", "winner", "baseline"], rows, caption)


def _progress(run: Run, gallery: Gallery, against: str) -> Picture:
    caption = f"Trials against {against}; those without a value stand on the lower edge."
    return gallery.figure(search_charts.progress(run, against), f"progress-by-{against}", caption)


def _top(run: Run) -> Table:
    names = list(run.searched)
    more = ["constraints"] if run.constraints else []
    header = ["", "trial", "status", words.metric(run.objectives[0]["metric"]), "best epoch", "time", *more, *names]
    rows: list[list[str]] = []
    strong: set[int] = set()
    for place, record in enumerate(best_first(run)[:TOP], start=1):
        if run.chosen and record["trial"] == run.chosen.trial:
            strong.add(len(rows))
        trial = record["trial"] + (" (baseline)" if record["baseline"] else "")
        status = words.STATUS_NAMES[record["status"]] + (", replayed" if record["replayed_from"] else "")
        epochs = f"{words.figure(record['best_epoch'])} of {words.figure(record['epochs'])}"
        settings = [words.setting(record["params"].get(name, record["config"].get(name))) for name in names]
        value = words.figure(objective(record), 4)
        violations = record.get("violations")
        stands = [words.NONE if violations is None else records.beyond(violations)] if more else []
        rows.append([str(place), trial, status, value, epochs, words.duration(record["seconds"]), *stands, *settings])
    caption = "The best trials on validation, completed ones first; of single trainings, so luck is in the order"
    return Table(header, rows, caption, frozenset({0, 3, 4, 5}), frozenset(strong))


def _states(run: Run, metrics: Json) -> Table:
    replayed = sum(record["replayed_from"] is not None for record in run.records)
    rows = [[words.STATUS_NAMES[status], f"{metrics['search'][status]:,}"] for status in STATUSES]
    rows += [["all", f"{len(run.records):,}"], ["of these replayed without training", f"{replayed:,}"]]
    return Table(["", ""], rows, "What became of the trials", frozenset({1}), frozenset({len(STATUSES)}))


def _reasons(run: Run) -> Table | None:
    """Why trials did not complete, the same reasons together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in run.records:
        if record["status"] != "completed":
            groups[record["status"], record["reason"] or "no reason was recorded"].append(record["trial"])
    if not groups:
        return None
    order = sorted(groups, key=lambda key: (-STATUSES.index(key[0]), key[1]))
    rows = []
    for status, reason in order:
        trials = groups[status, reason]
        more = f" and {len(trials) - 5} more" if len(trials) > 5 else ""
        rows.append([words.STATUS_NAMES[status], reason, f"{len(trials):,}", ", ".join(trials[:5]) + more])
    return Table(["status", "reason", "trials", "which"], rows, "Why trials did not complete", frozenset({2}))


def _slices(run: Run, gallery: Gallery) -> list[Picture]:
    pictures = []
    for name in run.searched:
        figure = search_charts.parameter_slice(run, name)
        if figure is not None:
            caption = f"{name}: hollow points were stopped early, the ring is the winner's configuration."
            pictures.append(gallery.figure(figure, f"slice-{words.file_name(name)}", caption, "third"))
    return pictures


def _time(run: Run, metrics: Json) -> Table:
    rows = [
        ["from start to end", words.duration(metrics["search"]["wall_seconds"])],
        ["on devices", words.duration(metrics["search"]["device_seconds"])],
    ]
    for status in STATUSES:
        spent = sum(r["device_seconds"] or 0 for r in run.records if r["status"] == status)
        if metrics["search"][status]:
            rows.append([f"on devices, {words.STATUS_NAMES[status]}", words.duration(spent)])
    return Table(["", ""], rows, "Time spent", frozenset({1}))


def provenance(run: Run) -> Section:
    """Command, data, versions, hardware, seeds, openings of the test split, definitions."""
    facts, hardware = run.facts, run.facts["hardware"]
    seeds = (words.setting(run.space.get("seed")), words.setting(run.chosen.config.get("seed") if run.chosen else None))
    rows = [
        ["run", f"{facts['name']} ({facts['id']})"],
        ["created", facts["created"]],
        ["data", facts["data_path"]],
        ["data fingerprint", run.data["fingerprint"]],
        ["search-space fingerprint", facts["space_fingerprint"]],
        ["seed", f"{seeds[0]} of the search, {seeds[1]} of the winner"],
        ["objective", "; ".join(f"{words.metric(o['metric'])}, {o.get('mode', 'max')}" for o in run.objectives)],
        [
            "processor",
            f"{hardware['cpu']}, {words.plural(hardware['cores'], 'core')}, {hardware['memory_gib']:.0f} GiB",
        ],
        ["GPUs", ", ".join(hardware["gpus"]) or "none"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)],
    ]
    if run.constraints:
        rows.insert(7, ["constraints", "; ".join(map(words.bound, run.constraints))])
    blocks: list[Block] = [Code(facts["command"]), Table(["", ""], rows), *_openings(run)]
    meanings = [*METRICS.values(), *OTHER_DEFINITIONS]
    definitions = Table(["figure", "definition"], meanings, "What the figures mean")
    return Section("provenance", "Where it comes from", [*blocks, definitions])


def _openings(run: Run) -> list[Block]:
    if not run.openings:
        return [Text("No opening of the test split was recorded.")]
    rows = [
        [opening["time"], opening["why"], ", ".join(map(str, opening["trials"])), opening.get("fingerprint", "")]
        for opening in run.openings
    ]
    count = "once" if len(rows) == 1 else f"{len(rows)} times"
    return [Table(["time", "why", "trials", "test images"], rows, f"The test split was opened {count}")]
