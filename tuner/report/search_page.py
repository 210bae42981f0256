"""The parts of the page on the search itself: how it went. Where everything comes from is in provenance.py."""

from __future__ import annotations

from tuner import records
from tuner.report import folds_page, search_charts, search_tables, trial_charts, words
from tuner.report.gallery import Block, Gallery, Picture, Pictures, Section, Table, Tables, Text
from tuner.report.inputs import Candidate, Json, Run
from tuner.report.provenance import provenance as provenance
from tuner.report.search_charts import winner_record
from tuner.report.tables import best_first, objective

TOP = 10


def search(run: Run, metrics: Json, gallery: Gallery) -> Section:
    """Progress, best trials, rungs, parameters, states and reasons, cost."""
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
    if not any(record["status"] == "completed" for record in run.records):
        blocks.append(Text("No trial has completed, so there is no best trial and nothing to choose from."))
    blocks.append(Pictures([_progress(run, gallery)]))
    if best_first(run):
        blocks.append(_top(run))
    blocks += folds_page.nested(run, metrics)
    blocks.append(Tables([search_tables.states(run, metrics), search_tables.cost(run, metrics)]))
    blocks += [*search_tables.reasons(run), *_learning(run, gallery), *_parameters(run, gallery)]
    if (figure := search_charts.timeline(run)) is not None:
        caption = "Each trial from its first start to its end; a held or interrupted one waited in between."
        blocks.append(Pictures([gallery.figure(figure, "timeline", caption, "full")]))
    return Section("search", "Search", blocks)


def _learning(run: Run, gallery: Gallery) -> list[Block]:
    """Learning curves of all trials, and the rungs at which they were compared."""
    rungs = search_tables.rungs(run)
    figure = trial_charts.learning_curves(run, rungs, winner_record(run))
    if figure is None:
        return [
            Text(f"No trial has reported {'a fold' if run.folds else 'an epoch'}, so there are no learning curves.")
        ]
    caption = "Learning curves of all trainings; a point is where one ended."
    if run.folds:
        caption = "The mean of each trial over its folds so far; a point is where one ended."
    if rungs:
        caption += (
            " At a dotted line trials are compared, and those that are not among the best wait there; each ends where "
            "it was left."
        )
    scheduler = run.space.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("compare") == "segmentation":
        caption += " Compared are the masks alone, without blackening."
    blocks: list[Block] = [Pictures([gallery.figure(figure, "learning-curves", caption, "full")])]
    return [*blocks, search_tables.rung_table(run, rungs)] if rungs else blocks


def _parameters(run: Run, gallery: Gallery) -> list[Block]:
    """What the searched parameters did."""
    if not run.searched:
        return [Text("Nothing was searched: the space fixes every parameter.")]
    blocks: list[Block] = []
    if (figure := trial_charts.parallel(run, winner_record(run))) is not None:
        caption = (
            "A line is a trial, from its parameters to its value: coloured if it completed, grey if it was stopped "
            "early, black for the winner."
        )
        if any(record["number"] is None for record in run.records):
            caption += " The baseline lies outside the space, so it differs in other fields too."
        if len(run.searched) > trial_charts.MAX_AXES:
            caption += f" Shown are the first {trial_charts.MAX_AXES} of {len(run.searched)} parameters."
        blocks.append(Pictures([gallery.figure(figure, "parallel-coordinates", caption, "full")]))
    blocks += _importance(run, gallery)
    if (table := search_tables.judging(run)) is not None:
        blocks.append(table)
    if slices := _slices(run, gallery):
        blocks.append(Pictures(slices))
    return blocks


def _importance(run: Run, gallery: Gallery) -> list[Block]:
    """How much each parameter mattered, or why that is not known."""
    found = run.importance
    if found is None:
        return [
            Text(
                "The run directory has no importance.json, so how much each parameter mattered is not shown; "
                "tuner resume writes it, also for a search that has finished."
            )
        ]
    if found["records"] != len(run.records):
        return [
            Text(
                f"importance.json was written of {words.plural(found['records'], 'record')}, and there are "
                f"{len(run.records):,}: how much each parameter mattered is not shown; tuner resume writes it again."
            )
        ]
    at = "completed" if found["epoch"] is None else f"reached {run.unit} {found['epoch']}"
    if not found["parameters"]:
        return [
            Text(
                f"How much each parameter mattered is not shown: {words.plural(found['trials'], 'trial')} that {at} "
                "tell too little, for ten with different values are needed, and a parameter that varies."
            )
        ]
    value = words.metric(found["metric"])
    caption = (
        f"Importance for {value} (PED-ANOVA): what tells the best {found['best']} from all {found['trials']:,} trials "
        f"that {at}{'' if found['epoch'] is None else ' or diverged before it, judged by their best up to there'}. "
        "From single trainings. Beyond the red mark luck alone brings no parameter but in one search of twenty."
    )
    clear = [row["name"] for row in found["parameters"] if trial_charts.is_clear(row)]
    told = (
        f"Parameters that mattered, clear of luck: {', '.join(clear)}."
        if clear
        else "No parameter's effect can be told from luck."
    )
    return [
        Text(told),
        Pictures([gallery.figure(trial_charts.importance(found), "importance", caption, "full")]),
    ]


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
    best = (winner_record(run) or {}).get("trial")
    strong = frozenset(n for n, point in enumerate(points) if point["trial"] == best)
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


def _progress(run: Run, gallery: Gallery) -> Picture:
    caption = (
        "Trials by number, against time, and against the time that their devices were held. Those without a value "
        "stand on the lower edge; a replay stands where the training ended that it was read off."
    )
    return gallery.figure(search_charts.progress(run), "progress", caption, "full")


def _top(run: Run) -> Table:
    names = list(run.searched)
    more = ["constraints"] if run.constraints else []
    reached = "folds" if run.folds else "best epoch"
    header = ["", "trial", "status", words.metric(run.objectives[0]["metric"]), reached, "time", *more, *names]
    rows: list[list[str]] = []
    strong: set[int] = set()
    best = (winner_record(run) or {}).get("trial")
    for place, record in enumerate(best_first(run)[:TOP], start=1):
        if record["trial"] == best:
            strong.add(len(rows))
        trial = record["trial"] + (" (baseline)" if record["baseline"] else "")
        status = words.STATUS_NAMES[record["status"]] + (", replayed" if record["replayed_from"] else "")
        epochs = f"{words.figure(record['best_epoch'])} of {words.figure(record['epochs'])}"
        if run.folds:
            epochs = words.figure(record["epochs"])
        settings = [words.setting(trial_charts.setting_of(record, name)) for name in names]
        value = words.figure(objective(record), 4)
        violations = record.get("violations")
        stands = [words.NONE if violations is None else records.beyond(violations)] if more else []
        rows.append([str(place), trial, status, value, epochs, words.duration(record["seconds"]), *stands, *settings])
    caption = "The best trials on validation, completed ones first; of single trainings, so luck is in the order"
    return Table(header, rows, caption, frozenset({0, 3, 4, 5}), frozenset(strong))


def _slices(run: Run, gallery: Gallery) -> list[Picture]:
    pictures = []
    winner = winner_record(run)
    for name in run.searched:
        figure = search_charts.parameter_slice(run, name)
        if figure is not None:
            caption = f"{name}: hollow points were stopped early"
            is_there = winner is not None and winner["params"].get(name) is not None
            caption += ", the ring is the winner." if is_there else "."
            pictures.append(gallery.figure(figure, f"slice-{words.file_name(name)}", caption, "third"))
    return pictures
