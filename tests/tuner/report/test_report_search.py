"""What the page says of the search: rungs, reasons, cost, importance, and the commands that make it again."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import yaml

from tests.tuner.conftest import small_space
from tuner.cli import _parser
from tuner.point import parse
from tuner.report import (
    inputs,
    provenance,
    render,
    search_charts,
    search_page,
    search_tables,
    style,
    tables,
    trial_charts,
    words,
)
from tuner.report.gallery import Gallery, Page
from tuner.space import Space

pytestmark = pytest.mark.timeout(240)


def changed(directory: Path, change: Any) -> None:
    """Every record as `change` returns it."""
    path = directory / "records.jsonl"
    found = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in found))


def note(directory: Path, **values: Any) -> None:
    path = directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def written(directory: Path) -> tuple[str, set[str]]:
    """The two sections as Markdown, and their figures."""
    run, folder = inputs.read(directory), Path(mkdtemp(dir=directory))
    metrics = {"search": tables.search_figures(run), "front": tables.front(run), "nested": None}
    with matplotlib.rc_context(style.RC):
        sections = [search_page.search(run, metrics, Gallery(folder)), provenance.provenance(run)]
    text = render.markdown(Page("", "", sections))
    render.html(Page("", "", sections), folder)
    return text, {path.stem for path in (folder / "figures").iterdir()}


def rows_of(text: str, caption: str) -> list[list[str]]:
    """A table by the beginning of its caption, without its header."""
    body = text[text.index(f"**{caption}") :].split("\n\n")[1]
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in body.splitlines()[2:]]


def test_device_time_adds_up_in_the_order_of_ends(make_run) -> None:
    run = inputs.read(make_run(tests=6)[0])
    devices, ends = search_charts.places(run, "devices"), search_charts.places(run, "time")
    order = sorted(devices, key=devices.get)
    assert [ends[trial] for trial in order] == sorted(ends.values())
    assert devices[order[-1]] == pytest.approx(sum(record["device_seconds"] for record in run.records))


def test_a_replay_stands_where_its_network_ended(make_run) -> None:
    directory, _ = make_run(tests=6)
    changed(directory, lambda r: r | ({"started": None, "device_seconds": 0.0} if r["replayed_from"] else {}))
    run = inputs.read(directory)
    for against in ("time", "devices"):
        found = search_charts.places(run, against)
        assert found["abc123-0007"] == found["abc123-0001"]


def test_rungs_say_who_reached_them_and_who_went_on(make_run) -> None:
    directory, _ = make_run(tests=6, asha=True)
    run = inputs.read(directory)
    first, second = search_tables.rungs(run)
    curves = {r["number"]: trial_charts.curve(r) for r in run.records[1:] if not r["replayed_from"]}
    there = sorted(curve[5] for curve in curves.values() if 5 in curve)
    assert (first["epoch"], first["reached"], first["went_on"]) == (5, 4, 2)
    assert (first["best"], first["median"]) == (there[-1], pytest.approx((there[1] + there[2]) / 2))
    assert (second["epoch"], second["reached"], second["went_on"]) == (15, 2, 2)
    text, figures = written(directory)
    assert [row[:3] for row in rows_of(text, "Rungs of asha")] == [["5", "4", "2"], ["15", "2", "2"]]
    assert {"learning-curves", "parallel-coordinates", "progress"} <= figures


def test_without_a_scheduler_there_are_curves_and_no_rungs(make_run) -> None:
    text, _ = written(make_run(tests=6)[0])
    assert "figures/learning-curves.png" in text
    assert "Rungs of" not in text


def test_reasons_that_differ_in_numbers_are_told_together(make_run) -> None:
    directory, _ = make_run(trials=40, tests=6)

    def crash(record: dict[str, Any]) -> dict[str, Any]:
        if record["status"] != "failed":
            return record
        lines = [f"  line {n} <b>" for n in range(30)]
        reason = f"out of memory: {record['number']}.5 GiB\nof " + "x" * 5000
        return record | {"reason": reason, "traceback": "\n".join([*lines, "MemoryError: " + "y" * 5000])}

    changed(directory, crash)
    text, _ = written(directory)
    (row,) = [row for row in rows_of(text, "Why trials did not complete") if row[0] == "failed"]
    assert row[1].startswith("out of memory: 5.5 GiB of xxx")
    assert row[1].endswith("(with other numbers too)")
    assert len(row[1]) < 260
    assert row[2:] == ["5", "abc123-0005, abc123-0013, abc123-0021 and 2 more"]
    assert "    MemoryError: yyy" in text
    assert "line 29 <b>" in text
    assert "line 3 <b>" not in text
    assert max(map(len, re.findall(r"x+|y+", text))) <= 40


def test_many_kinds_of_reasons_are_cut(make_run) -> None:
    directory, _ = make_run(trials=80, tests=6)
    names = iter("abcdefghijklmnopqrstuvwxyz")
    changed(directory, lambda r: r | ({"reason": next(names)} if r["status"] in ("failed", "diverged") else {}))
    text, _ = written(directory)
    rows = rows_of(text, "Why trials did not complete")
    assert len(rows) == 16
    assert rows[-1][1] == "6 other reasons; all are in records.jsonl"


def test_cost_says_what_was_spent_on_what(make_run) -> None:
    directory, _ = make_run(tests=6)
    space = json.loads((directory / "run.json").read_text())["space"]
    note(directory, space=space | {"budget": {"money": 10.0, "price_per_device_hour": 3.6}})
    text, _ = written(directory)
    cost = dict(rows_of(text, "Cost"))
    spent = sum(r["device_seconds"] for r in inputs.read(directory).records)
    assert cost["money"] == f"{spent / 1000:.2f} at 3.6 a device-hour"
    assert cost["epochs trained"] == "74 of 140 planned"
    assert cost["replays, which cost nothing"] == "1"
    assert cost["bought, best completed trial over baseline"].endswith("Dice, all images, validation")


def test_ways_of_judging_are_compared_on_the_same_networks(make_run) -> None:
    directory, _ = make_run(tests=6)

    def judged(record: dict[str, Any]) -> dict[str, Any]:
        if record["value"] is None:
            return record
        ways = [("grid", 1, 0.0), ("pr_curve", 1, 0.1), ("pr_curve", 2, 0.2)]
        replays = [
            {"threshold_rule": rule, "threshold_factor": factor, "value": record["value"] - behind, "epoch": 1}
            for rule, factor, behind in ways
        ]
        return record | {"replays": replays}

    changed(directory, judged)
    text, _ = written(directory)
    assert "Ways of judging, on the same 3 networks that completed" in text
    rows = rows_of(text, "Ways of judging")
    assert [row[0] for row in rows] == ["grid", "pr_curve/1", "pr_curve/2"]
    assert [row[2:] for row in rows] == [["0.0000", "3"], ["0.1000", "0"], ["0.2000", "0"]]


def importance(parameters: list[dict[str, Any]], trials: int = 30, epoch: int | None = None) -> dict[str, Any]:
    """Of a run with two records."""
    found = {"schema": 1, "metric": "dice_mean", "records": 2, "epoch": epoch, "trials": trials}
    return found | {"best": 6 if parameters else None, "parameters": parameters}


def test_importance_is_shown_or_its_absence_explained(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    text, figures = written(directory)
    assert "has no importance.json" in text
    assert "tuner resume writes it" in text
    assert "importance" not in figures
    path = directory / "importance.json"
    path.write_text(json.dumps(importance([], trials=7, epoch=5)))
    assert "7 trials that reached epoch 5 tell too little" in written(directory)[0]
    rows = [
        {"name": "dilate", "importance": 0.9, "ci90": [0.7, 1.0], "chance": 0.2},
        {"name": "learning_rate", "importance": 0.1, "ci90": [0.0, 0.3], "chance": 0.2},
    ]
    path.write_text(json.dumps(importance(rows)))
    text, figures = written(directory)
    assert "importance" in figures
    assert "Parameters that mattered, clear of luck: dilate." in text
    assert "the best 6 from all 30 trials that completed" in text
    path.write_text(json.dumps(importance(rows[1:])))
    assert "No parameter's effect can be told from luck." in written(directory)[0]


def test_commands_are_taken_as_they_are_shown(make_run) -> None:
    directory, _ = make_run(tests=6)
    note(directory, options={"concurrent": 2, "cpus_per_trial": 2.0, "gpus_per_trial": None, "warm_start": "/a run"})
    run = inputs.read(directory)
    parsed = _parser().parse_args(shlex.split(provenance.search_command(run))[1:])
    assert (parsed.space, parsed.data, parsed.seed) == ("space.yaml", "/data/cracks <i>", 0)
    assert (parsed.concurrent, parsed.cpus_per_trial, parsed.warm_start) == (2, 2, "/a run")
    record = run.records[1]
    parsed = _parser().parse_args(shlex.split(provenance.trial_command(run, record))[1:])
    assert (parsed.data, parsed.seed, parsed.cpus_per_trial) == ("/data/cracks <i>", 0, 2)
    assert dict(word.split("=") for word in parsed.set).keys() == record["params"].keys()
    assert provenance.trial_command(run, record | {"number": None}) is None


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-05, 1.0, 99.123456789])
def test_values_keep_every_digit(value: float) -> None:
    space = small_space(search={"learning_rate": {"type": "float", "low": 1e-6, "high": 100.0}, "augment_flips": FLIPS})
    record = {"number": 3, "params": {"learning_rate": value, "augment_flips": True}, "seed": 1}
    assert point(space, record) == record["params"]


FLIPS = {"type": "categorical", "choices": [True, False]}


def point(space: Space, record: dict[str, Any]) -> dict[str, Any]:
    """The point that `tuner trial` makes of its command in a report."""
    facts = {"options": {}, "data_path": "synthetic"}
    run = SimpleNamespace(facts=facts, searched=space.to_dict()["search"])
    words = shlex.split(provenance.trial_command(run, record))  # type: ignore[arg-type]
    return parse(space, words[words.index("--set") + 1 : words.index("--seed")]).params


def test_the_space_is_printed_in_full_and_sessions_are_counted(make_run) -> None:
    directory, _ = make_run(trials=2, tests=6)
    sessions = [{"started": 1e9, "ended": 1e9 + 60}, {"started": 1e9 + 100, "ended": None}]
    note(directory, sessions=sessions, state="stopped")
    text, _ = written(directory)
    code = text[text.index("The search space in full") :].split("\n\n", 1)[1]
    described = yaml.safe_load("\n".join(line[4:] for line in code.splitlines()))
    assert described == inputs.read(directory).space
    assert "it was resumed once and is stopped" in text
    assert ["1", "2001-09-09 01:46:40", "2001-09-09 01:47:40", "1 min"] in rows_of(text, "Sessions of the search")


def failed(record: dict[str, Any]) -> dict[str, Any]:
    gone = {"status": "failed", "reason": "boom", "value": None, "best_epoch": None, "history": [], "values": None}
    return record | gone | {"thresholds": None, "epochs": 0, "started": None, "seconds": None, "device_seconds": 0.0}


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"trials": 1, "baseline_wins": True}, lambda r: r),
        ({"trials": 8, "asha": True}, failed),
        ({"trials": 8, "asha": True}, lambda r: r | {"status": "stopped_early", "reason": "because"}),
        ({"trials": 8, "asha": True}, lambda r: r | {"history": []}),
        ({"trials": 8, "objectives": 2, "asha": True}, lambda r: r),
        ({"trials": 8, "recall_beyond": [0.1] * 8}, lambda r: r),
        ({"trials": 8}, lambda r: r | ({"number": None, "params": {"width": 1}} if r["baseline"] else {})),
    ],
    ids=["one", "failed", "none completed", "no history", "two objectives", "constraints", "baseline outside"],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_page_stays_whole(make_run, options: dict[str, Any], change: Any) -> None:
    directory, _ = make_run(tests=6, **options)
    changed(directory, change)
    text, figures = written(directory)
    assert "progress" in figures
    assert rows_of(text, "Cost")
    records = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    assert ("No trial has completed" in text) == all(record["status"] != "completed" for record in records)
    assert ("no learning curves" in text) == all(not record["history"] for record in records)
    assert ("learning-curves" in figures) == any(record["history"] for record in records)
    assert ("parallel-coordinates" in figures) == any(record["value"] is not None for record in records)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_baseline_of_0_stands_below_a_logarithmic_axis(make_run) -> None:
    """The field of a baseline outside the space may be what no logarithm has."""
    directory, _ = make_run(trials=8, tests=6)
    space = json.loads((directory / "run.json").read_text())["space"]
    brightness = {"type": "float", "low": 0.01, "high": 0.3, "log": True}
    note(directory, space=space | {"search": space["search"] | {"augment_brightness": brightness}})

    def outside(record: dict[str, Any]) -> dict[str, Any]:
        if record["baseline"]:
            return record | {"number": None, "params": {}, "config": record["config"] | {"augment_brightness": 0.0}}
        value = 0.01 * (1 + record["number"])
        return record | {"params": record["params"] | {"augment_brightness": value}}

    changed(directory, outside)
    run = inputs.read(directory)
    with matplotlib.rc_context(style.RC):
        figure = trial_charts.parallel(run, run.records[0])
        figure.savefig(directory / "parallel.png")
        assert search_charts.parameter_slice(run, "augment_brightness") is not None
    assert max(figure.axes[0].get_tightbbox().bounds) < 10_000
    axis = trial_charts._Axis(brightness, [0.0, 0.1, None])
    assert axis.ticks[0][0] == "0.01"
    assert axis.ticks[-1] == ("0", axis.height(0.0, 0))
    assert trial_charts._NOT_SET < axis.height(0.0, 0) < axis.height(0.01, 0) == 0
    assert written(directory)[1] >= {"parallel-coordinates"}


def test_long_choices_are_broken_into_lines(make_run) -> None:
    run = inputs.read(make_run(tests=6)[0])
    with matplotlib.rc_context(style.RC):
        texts = [text.get_text() for text in trial_charts.parallel(run, None).axes[0].texts]
    assert "segdecnet_\nplusplus" in texts


@pytest.mark.parametrize(("chance", "shown"), [(0.3, 0.3), (1.2, 1.2), (7.0, 1.5)])
def test_what_luck_reaches_is_in_the_picture(chance: float, shown: float) -> None:
    rows = [
        {"name": "dilate", "importance": 0.9, "ci90": [0.7, 1.0], "chance": chance},
        {"name": "learning_rate", "importance": 0.1, "ci90": [0.0, 0.3], "chance": 0.2},
    ]
    with matplotlib.rc_context(style.RC):
        axes = trial_charts.importance(importance(rows)).axes[0]
    marks = [x for line in axes.lines if line.get_color() == style.RED for x in line.get_xdata()]
    assert sorted(marks) == sorted([0.2, shown])
    assert axes.get_xlim()[1] >= max(marks)
    assert [text.get_text() for text in axes.texts] == (["7"] if chance > shown else [])


def test_one_network_compares_no_ways_of_judging(make_run) -> None:
    run = inputs.read(make_run(tests=6)[0])
    networks = [r for r in run.records if r["status"] == "completed" and not r["replayed_from"]]
    assert search_tables.judging(run) is not None
    assert search_tables.judging(replace(run, records=networks[:1])) is None
    assert search_tables.judging(replace(run, records=networks[:2])) is not None


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "59 s"), (59.7, "1 min"), (89, "1 min"), (3599, "1 h 00 min")])
def test_durations_are_rounded_before_their_unit_is_chosen(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text
