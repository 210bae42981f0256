"""Tables of how the search went: rungs, what became of trials and why, ways of judging, cost."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np

from model.config import DEFAULTS, JUDGING_FIELDS, Judgement
from tuner import records, schedulers
from tuner.report import words
from tuner.report.gallery import Block, Code, Table, Text
from tuner.report.inputs import Json, Run
from tuner.report.tables import STATUSES, objective
from tuner.report.trial_charts import compared_name, curve
from tuner.space import Scheduler

_MOST_REASONS = 15
_MOST_TRACEBACKS = 2
_LAST_LINES = 12
_MOST_WAYS = 12


def rungs(run: Run) -> list[Json]:
    """By epoch at which trials are compared: `reached`, `went_on`, and the `best` and `median` figure compared. The
    baseline and what was read off another's network are not compared."""
    described = run.space.get("scheduler")
    if not isinstance(described, dict):
        return []
    scheduler = Scheduler(**described)
    at: defaultdict[int, list[tuple[float, bool]]] = defaultdict(list)
    for record in run.records:
        found = curve(record)
        if record["baseline"] or record["replayed_from"] or not found:
            continue
        for rung in schedulers.rungs(scheduler, run.trial_length(record), record["number"]):
            if rung in found:
                at[rung].append((found[rung], max(found) > rung))
    return [
        {
            "epoch": epoch,
            "reached": len(at[epoch]),
            "went_on": sum(went_on for _, went_on in at[epoch]),
            "best": max(value for value, _ in at[epoch]),
            "median": float(np.median([value for value, _ in at[epoch]])),
        }
        for epoch in sorted(at)
    ]


def rung_table(run: Run, found: list[Json]) -> Table:
    rows = [
        [str(rung["epoch"]), f"{rung['reached']:,}", f"{rung['went_on']:,}", words.figure(rung["best"], 4),
         words.figure(rung["median"], 4)]
        for rung in found
    ]  # fmt: skip
    name = run.space["scheduler"]["name"]
    header = [run.unit, "reached it", "went on", "best there", "median there"]
    caption = f"Rungs of {name}: {compared_name(run)}; without the baseline. Who went on did so at once or later"
    return Table(header, rows, caption, frozenset(range(5)))


def states(run: Run, metrics: Json) -> Table:
    replayed = sum(record["replayed_from"] is not None for record in run.records)
    rows = [[words.STATUS_NAMES[status], f"{metrics['search'][status]:,}"] for status in STATUSES]
    rows += [["all", f"{len(run.records):,}"], ["of these replayed without training", f"{replayed:,}"]]
    return Table(["", ""], rows, "What became of the trials", frozenset({1}), frozenset({len(STATUSES)}))


def reasons(run: Run) -> list[Block]:
    """Why trials did not complete, the same reasons together, and where the most frequent crashes came from."""
    groups: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for record in run.records:
        if record["status"] != "completed":
            groups[record["status"], _kind(record)].append(record)
    if not groups:
        return []
    order = sorted(groups, key=lambda key: (-STATUSES.index(key[0]), -len(groups[key]), key[1]))
    rows = []
    for status, kind in order[:_MOST_REASONS]:
        trials = [record["trial"] for record in groups[status, kind]]
        more = f" and {len(trials) - 3:,} more" if len(trials) > 3 else ""
        texts = {_reason(record) for record in groups[status, kind]}
        text = _short(_reason(groups[status, kind][0]), 200) + (" (with other numbers too)" if len(texts) > 1 else "")
        rows.append([words.STATUS_NAMES[status], text, f"{len(trials):,}", ", ".join(trials[:3]) + more])
    if others := order[_MOST_REASONS:]:
        count = sum(len(groups[key]) for key in others)
        rows.append(["", f"{words.plural(len(others), 'other reason')}; all are in records.jsonl", f"{count:,}", ""])
    blocks: list[Block] = [
        Table(["status", "reason", "trials", "which"], rows, "Why trials did not complete", frozenset({2}))
    ]
    crashed = [
        groups[key][0] for key in sorted(order, key=lambda key: -len(groups[key])) if groups[key][0].get("traceback")
    ]
    for record in crashed[:_MOST_TRACEBACKS]:
        lines = record["traceback"].strip().splitlines()
        cut = len(lines) > _LAST_LINES
        blocks.append(Text(f"Where {record['trial']} failed{', the last lines' if cut else ''}:"))
        blocks.append(Code("\n".join(_short(line, 160) for line in lines[-_LAST_LINES:])))
    return blocks


def _reason(record: Json) -> str:
    return " ".join((record["reason"] or "no reason was recorded").split())


def _kind(record: Json) -> str:
    """The reason; of crashes without its numbers, for sizes of memory and lines of code differ."""
    text = _reason(record)
    return text if record["status"] == "stopped_early" else re.sub(r"\d+(\.\d+)?", "#", text)


def _short(text: str, length: int) -> str:
    """Cut in the middle, and so is every long word, which would make a table wider than the page."""
    return words.shorten(re.sub(r"\S{41,}", lambda word: words.shorten(word.group(), 40), text), length)


def judging(run: Run) -> Table | None:
    """What each way of judging gives on the same networks; None where only one way was searched."""
    if not set(run.searched) & set(JUDGING_FIELDS):
        return None
    networks = [
        {Judgement.of(DEFAULTS | replay): replay["value"] for replay in record.get("replays") or ()}
        for record in run.records
        if record["status"] == "completed" and not record["replayed_from"]
    ]
    networks = [{way: value for way, value in network.items() if value is not None} for network in networks]
    networks = [network for network in networks if network]
    found = dict.fromkeys(way for network in networks for way in network)
    common = [way for way in found if all(way in network for network in networks)]
    if len(networks) < 2 or len(common) < 2:
        return None
    sign = 1 if run.objectives[0].get("mode", "max") == "max" else -1
    value_NW = np.array([[network[way] for way in common] for network in networks])
    best_N1 = (sign * value_NW).max(axis=1, keepdims=True)
    behind_NW = best_N1 - sign * value_NW
    order = np.argsort(behind_NW.mean(axis=0), kind="stable")[:_MOST_WAYS]
    rows = [
        [_way(run, common[w]), words.figure(float(value_NW[:, w].mean()), 4), f"{behind_NW[:, w].mean():.4f}",
         f"{(behind_NW[:, w] == 0).sum():,}"]
        for w in order
    ]  # fmt: skip
    shown = "" if len(common) <= _MOST_WAYS else f"the best {_MOST_WAYS} of {len(common)} "
    caption = (
        f"{shown}ways of judging, on the same {words.plural(len(networks), 'network')} that completed: between them "
        "there is no luck of training"
    )
    header = [
        "way",
        f"mean {words.metric(run.objectives[0]['metric'])}",
        "behind the network's best",
        "best on networks",
    ]
    return Table(header, rows, caption[0].upper() + caption[1:], frozenset({1, 2, 3}))


def _way(run: Run, way: Judgement) -> str:
    """The fields that are searched; a factor only where its rule has one."""
    said: dict[str, Any] = {name: getattr(way, name) for name in JUDGING_FIELDS if name in run.searched}
    rule = said.pop("threshold_rule", way.threshold_rule)
    factor = said.pop("threshold_factor", way.threshold_factor)
    text = f"{rule}/{factor}" if rule == "pr_curve" else str(rule)
    return ", ".join([text, *(f"{name} {words.setting(value)}" for name, value in said.items())])


def cost(run: Run, metrics: Json) -> Table:
    """Time, devices and money, and what they bought."""
    found = metrics["search"]
    device_seconds, completed = found["device_seconds"], found["completed"]
    trained = records.charged(run.records)
    epochs = sum(record["epochs"] or 0 for record in trained)
    planned = sum(run.trial_length(record) for record in trained)
    rows = [
        ["from start to end", words.duration(found["wall_seconds"])],
        ["on devices", _device_hours(device_seconds)],
    ]
    for status in STATUSES:
        spent = sum(record["device_seconds"] or 0 for record in run.records if record["status"] == status)
        if found[status]:
            share = f" ({spent / device_seconds:.0%})" if device_seconds else ""
            rows.append([f"of these, {words.STATUS_NAMES[status]}", _device_hours(spent) + share])
    own = sum(record["status"] == "completed" for record in trained)
    if own:
        rows.append(["all device time over completed trainings", _device_hours(device_seconds / own)])
    rows.append([f"{run.unit}s trained", f"{epochs:,} of {planned:,} planned" if planned else f"{epochs:,}"])
    price = (run.space.get("budget") or {}).get("price_per_device_hour")
    if price:
        rows.append(["money", f"{device_seconds / 3600 * price:,.2f} at {price:g} a device-hour"])
    if completed and (replayed := len(run.records) - len(trained)):
        rows.append(["replays, which cost nothing", f"{replayed:,}"])
    if (gain := _gain(run)) is not None:
        rows.append(["bought, best completed trial over baseline", gain])
    return Table(["", ""], rows, "Cost; without what crashes and stops lost", frozenset({1}))


def _device_hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds >= 36 else f"{seconds:.0f} s"


def _gain(run: Run) -> str | None:
    """On validation, of single trainings."""
    best, baseline = records.best(run.records), records.baseline(run.records)
    if best is None or baseline is None or (before := objective(baseline)) is None or best["baseline"]:
        return None
    return f"{best['value'] - before:+.4f} {words.metric(run.objectives[0]['metric'])}, validation"
