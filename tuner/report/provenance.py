"""Where everything comes from: commands that make it again, data, versions, hardware, seeds, sessions, openings."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import Any

import yaml

from model.metrics import METRICS
from tuner.report import words
from tuner.report.gallery import Block, Code, Section, Table, Text
from tuner.report.inputs import Json, Run
from tuner.report.search_charts import winner_record

SPACE_FILE = "space.yaml"
"""what the reader is told to call the search space"""

OTHER_DEFINITIONS = (
    ("hits, predicted, truth", "pixels of an image in both, in the predicted mask, in the mask as drawn"),
    ("truth", "the masks as drawn, never dilated, at the network's input size"),
    ("threshold", "a pixel or an image is a defect when its score is at least the threshold"),
    (
        "95 % interval",
        "over groups of images, none below 20 but for the bars of the calibration: studentized bootstrap for means, "
        "pooled ratios and paired differences; Clopper-Pearson with an effective number of images for the decision's "
        "rates; Newcombe 2006 for its AUC; binomial among the positives for its AP; jackknife for pixel AP and ODS",
    ),
)

_RESOURCES = ("cpus_per_trial", "gpus_per_trial")


def provenance(run: Run) -> Section:
    meanings = [*METRICS.values(), *OTHER_DEFINITIONS]
    blocks: list[Block] = [
        *_commands(run),
        _facts(run),
        *_sessions(run),
        *_openings(run),
        Table(["figure", "definition"], meanings, "What the figures mean"),
        Text(f"The search space in full; the commands above call it {SPACE_FILE}."),
        Code(yaml.safe_dump(run.space, sort_keys=False, allow_unicode=True, width=100).rstrip()),
    ]
    return Section("provenance", "Where it comes from", blocks)


def _commands(run: Run) -> list[Block]:
    """The search as it was called and with everything resolved, and its winner alone."""
    blocks: list[Block] = [Text("The search was started with:"), Code(run.facts["command"])]
    where = "" if run.facts["data_path"] == "synthetic" else " and give the path of the data where you have them"
    blocks += [
        Text(f"To make it again, save the search space at the end of this page as {SPACE_FILE}{where}:"),
        Code(search_command(run)),
    ]
    budget = run.space.get("budget") or {}
    if run.facts["options"].get("concurrent") != 1 or {"hours", "device_hours", "money"} & set(budget):
        blocks.append(
            Text(
                "Which trials are proposed may differ then: with several trials at once, or a limit of time or money, "
                "it depends on which of them end first. What a trial gives does not."
            )
        )
    record = winner_record(run)
    if record is None:
        return blocks
    command = trial_command(run, record)
    if command is None:
        return [
            *blocks,
            Text(
                f"{record['trial']} lies outside the search space, so tuner trial cannot train it. As the baseline it "
                "is the first trial of every search of that space; this trains it alone:"
            ),
            Code(f"{search_command(run)} --trials 1 --no-report"),
        ]
    exact = "" if run.facts["hardware"]["gpus"] else ", on CPUs of this kind to the last bit"
    text = f"To train {record['trial']} alone, which gives its value on validation again{exact}:"
    return [*blocks, Text(text), Code(command)]


def search_command(run: Run, data: str | None = None) -> str:
    """`tuner search` with what the space does not say already; `data` stands for the path of files."""
    options, path = run.facts["options"], run.facts["data_path"]
    where = path if path == "synthetic" else data or path
    words_ = ["tuner", "search", SPACE_FILE, "--data", where, "--seed", str(run.space.get("seed", 0))]
    for name in ("concurrent", *_RESOURCES, "warm_start"):
        if options.get(name) is not None:
            words_ += [f"--{name.replace('_', '-')}", _number(options[name])]
    return shlex.join(words_)


def trial_command(run: Run, record: Json) -> str | None:
    """`tuner trial` for one record; None for one that lies outside the space."""
    if record["number"] is None or not set(record["params"]) <= set(run.searched):
        return None
    said = ["tuner", "trial", SPACE_FILE, "--data", run.facts["data_path"]]
    if record["params"]:
        said += ["--set", *(f"{name}={_written(value)}" for name, value in record["params"].items())]
    said += ["--seed", str(record["seed"])]
    for name in _RESOURCES:
        if run.facts["options"].get(name) is not None:
            said += [f"--{name.replace('_', '-')}", _number(run.facts["options"][name])]
    return shlex.join(said)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _written(value: Any) -> str:
    """A value with all its digits, as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _facts(run: Run) -> Table:
    facts, hardware = run.facts, run.facts["hardware"]
    record = winner_record(run)
    seeds = f"{words.setting(run.space.get('seed'))} of the search and its splits"
    if record is not None:
        seeds += f", {words.setting(record['seed'])} of the winner's training"
    rows = [
        ["run", f"{facts['name']} ({facts['id']})"],
        ["created", facts["created"]],
        ["data", facts["data_path"]],
        ["data fingerprint", run.data["fingerprint"]],
        ["search-space fingerprint", facts["space_fingerprint"]],
        ["seed", seeds],
        ["objective", "; ".join(f"{words.metric(o['metric'])}, {o.get('mode', 'max')}" for o in run.objectives)],
        *([["constraints", "; ".join(map(words.bound, run.constraints))]] if run.constraints else []),
        [
            "processor",
            f"{hardware['cpu']}, {words.plural(hardware['cores'], 'core')}, {hardware['memory_gib']:.0f} GiB",
        ],
        ["GPUs", ", ".join(hardware["gpus"]) or "none"],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)],
    ]
    return Table(["", ""], rows)


def _sessions(run: Run) -> list[Block]:
    """When the search ran; it may have been stopped and resumed."""
    sessions = run.facts.get("sessions") or []
    if not sessions:
        return []
    rows = []
    for number, session in enumerate(sessions, start=1):
        began, ended = session["started"], session["ended"]
        took = "" if ended is None else words.duration(ended - began)
        rows.append([str(number), _moment(began), "it has no end" if ended is None else _moment(ended), took])
    count = len(sessions) - 1
    resumed = "never resumed" if not count else "resumed once" if count == 1 else f"resumed {count:,} times"
    state = run.facts.get("state", "")
    caption = f"Sessions of the search, UTC; it was {resumed}" + (f" and is {state}" if state else "")
    if len(rows) > 20:
        rows = [*rows[:10], ["", f"{len(rows) - 20:,} more", "", ""], *rows[-10:]]
    return [Table(["", "started", "ended", "took"], rows, caption, frozenset({0, 3}))]


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _openings(run: Run) -> list[Block]:
    if not run.openings:
        return [Text("No opening of the test split was recorded.")]
    rows = [
        [opening["time"], opening["why"], ", ".join(map(str, opening["trials"])), opening.get("fingerprint", "")]
        for opening in run.openings
    ]
    count = "once" if len(rows) == 1 else f"{len(rows)} times"
    return [Table(["time", "why", "trials", "test images"], rows, f"The test split was opened {count}")]
