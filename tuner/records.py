"""What a search leaves for others: one record a finished trial, in records.jsonl. The keys are in
docs/run-directory.md. The study holds the same records; this file is written from them.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import DEFAULTS, Judgement, RunConfig
from model.files import write_atomically
from tuner.space import Space

FILE = "records.jsonl"

OPEN_TEST = "open-test"
"""Below evaluation/ and report/: what thresholds chosen on test give."""


class Status(enum.StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    STOPPED_EARLY = "stopped_early"
    DIVERGED = "diverged"
    FAILED = "failed"


class NodeUnfit(ValueError):
    """This node cannot run trials, whichever they are: no failure of the trial that found it out. The message says what
    is wrong with the node, and the way out."""


class SearchFailed(RuntimeError):
    """A search that cannot go on, or that has nothing to show; the message says why."""


@dataclass(frozen=True)
class Proposal:
    """A trial that is to run, or to go on."""

    trial: str
    number: int | None
    """in the study, or in the collection; None for a baseline outside the space"""
    params: dict[str, Any]
    config: RunConfig
    is_baseline: bool
    drawn: str = "given"
    """where its parameters are from: given (the baseline, a point to start from), random, or model, what the sampler
    has learnt"""

    def identity(self) -> dict[str, Any]:
        """What a record of it says before anything has been trained."""
        return {
            "trial": self.trial,
            "number": self.number,
            "baseline": self.is_baseline,
            "seed": self.config.seed,
            "params": self.params,
            "config": self.config.to_dict(),
            "drawn": self.drawn,
            "replayed_from": None,
        }


class RecordsFile:
    """records.jsonl, or one like it, written whole each time, from lines that are made once."""

    def __init__(self, run_directory: Path, name: str = FILE) -> None:
        self._path = run_directory / name
        self._lines: dict[tuple[str, float | None], str] = {}
        self._written: list[tuple[str, float | None]] | None = None

    def write(self, records: list[dict[str, Any]]) -> None:
        """Replaces the file at once, if it does not hold just these records. A record changes only with its end."""
        keys = [(record["trial"], record["ended"]) for record in records]
        if keys == self._written:
            return
        for key, record in zip(keys, records, strict=True):
            if key not in self._lines:
                self._lines[key] = json.dumps(record, allow_nan=False) + "\n"
        write_atomically(self._path, "".join(map(self._lines.__getitem__, keys)).encode())
        self._written = keys


def read(run_directory: Path) -> list[dict[str, Any]]:
    """All records, in the order of the study; none if nothing has finished yet."""
    path = run_directory / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trial_id(run_id: str, number: int | None) -> str:
    """The name of a trial everywhere: in records, folders and W&B. No number is a baseline outside the space."""
    return f"{run_id}-{'baseline' if number is None else format(number, '04d')}"


def joined(attributes: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A record among the attributes of a study or a trial, joined where it lies in parts (tuner/sampler.py)."""
    found = attributes.get(name)
    if isinstance(found, int):
        found = json.loads("".join(attributes[f"{name}-{n}"] for n in range(found)))
    return found


def best(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The completed trial with the largest value among those that meet the constraints; the earlier one of equals.
    Of two objectives the first decides. Stopped ones have not seen the end of the loss schedule, so their values are
    no match."""
    return max((r for r in _completed(records) if is_feasible(r)), key=lambda r: r["value"], default=None)


def nearest(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """What stands in for the best where trials have completed and none meets the constraints: the one that is least
    beyond them, in sum; of equals the one with the largest value. None where there is a best, or none has completed."""
    completed = _completed(records)
    if any(map(is_feasible, completed)):
        return None
    return min(completed, key=lambda r: (sum(r["violations"].values()), -r["value"]), default=None)


def none_feasible(nearest: Mapping[str, Any]) -> str:
    """The message to `nearest`."""
    return (
        f"no completed trial meets the constraints; {nearest['trial']} comes nearest: {beyond(nearest['violations'])}"
    )


def beyond(violations: Mapping[str, float] | None) -> str:
    """Violated constraints in words; "met" where there is none."""
    return ", ".join(f"{name} {by:.3g} beyond its bound" for name, by in (violations or {}).items() if by) or "met"


def is_feasible(record: dict[str, Any]) -> bool:
    """Whether a trial meets every constraint of its space."""
    return not any((record.get("violations") or {}).values())


def pareto_front(records: Iterable[dict[str, Any]], modes: Sequence[str]) -> list[dict[str, Any]]:
    """The completed trials that meet the constraints and that no other such trial equals or betters in all objectives
    and betters in one. `modes`: max or min, of each objective. Trials with the same values are on it together."""

    def losses(record: dict[str, Any]) -> tuple[float, ...]:
        return tuple(-v if mode == "max" else v for v, mode in zip(record["values"], modes, strict=True))

    found = [(losses(r), r) for r in _completed(records) if r.get("values") and is_feasible(r)]

    def is_beaten(mine: tuple[float, ...]) -> bool:
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other, _ in found)

    return [record for mine, record in found if not is_beaten(mine)]


def front(records: Iterable[dict[str, Any]], modes: Sequence[str]) -> list[dict[str, Any]] | None:
    """The Pareto front as it is shown, by the last objective and then the first: `trial`, `values` and `params`, of
    equal values the first trial alone. None with one objective."""
    if len(modes) < 2:
        return None
    distinct = {tuple(r["values"]): r for r in reversed(pareto_front(records, modes))}
    return [
        {key: distinct[v][key] for key in ("trial", "values", "params")}
        for v in sorted(distinct, key=lambda v: v[::-1])
    ]


def _completed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["status"] == Status.COMPLETED and r["value"] is not None]


def cost(space: Space, record: dict[str, Any]) -> float | None:
    """What a training cost, by the second objective of a space, from its record; None where the record does not know
    how many masks, or labels, there were."""
    assert space.cost is not None
    if space.cost.metric == "device_seconds":
        seconds: float = record["device_seconds"]
        return seconds
    masks = masks_of(record)
    if space.cost.metric == "num_segmented":
        return masks
    assert space.labelling is not None
    labelled = record.get("labelled")
    return None if masks is None or labelled is None else space.labelling.minutes(labelled, masks)


def masks_of(record: Mapping[str, Any]) -> int | None:
    """With how many masks of positives a network was trained; None where the record says no more than all of them."""
    kept = record["config"]["num_segmented"]
    return record.get("num_segmented", None if kept == "all" else kept)


def judged(space: Space, record: dict[str, Any], trained: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record with what its space asks for: `values` where there are two objectives, `violations` where there are
    constraints. `trained` is the record whose network a replay was read off."""
    if space.cost:
        record = record | {"values": values(space, record, trained or record)}
    if space.constraints:
        beyond_by = {metric: max(0.0, excess) for metric, excess in excesses(space, record).items()}
        record = record | {"violations": beyond_by or None}
    return record


def values(space: Space, record: dict[str, Any], trained: dict[str, Any] | None) -> list[float] | None:
    """What a trial came to, one an objective; None where the record does not say all. `trained` is the record whose
    training it is."""
    found = [record["value"]]
    if space.cost:
        found.append(trained and cost(space, trained))
    return None if None in found else found


def excesses(space: Space, record: dict[str, Any]) -> dict[str, float]:
    """How far a trial lies beyond each constraint, by figure; nothing for one that has no epoch to judge."""
    if record["value"] is None or record["status"] in (Status.DIVERGED, Status.FAILED):
        return {}
    found = figures(record)
    return {bound.metric: bound.excess(found.get(bound.metric)) for bound in space.constraints}


def figures(record: dict[str, Any]) -> dict[str, float | None]:
    """What a record knows of the epoch whose weights it keeps, judged in its own way."""
    wanted = Judgement.of(DEFAULTS | record["config"])
    replay: dict[str, Any] = next((one for one in record["replays"] if Judgement.of(one) == wanted), {})
    own = [] if record["replayed_from"] else record["history"]  # a replay has the history of the other trial
    # Of folds the last row has the means of all that are done.
    rows = own[-1:] if "folds" in record else [row for row in own if row["epoch"] == record["best_epoch"]]
    return {**(rows[0] if rows else {}), **replay.get("figures", {})}


def cannot_win(records: Iterable[dict[str, Any]], kept: int = 3) -> set[str]:
    """Completed trials that will not be the winner, whatever the sampler still proposes: judged in their best way they
    are worse than the best so far. The best few are never among them, nor the baseline.

    Where the winner depends on more than one figure nobody is ruled out.
    """
    completed = [r for r in records if r["status"] == Status.COMPLETED and r["value"] is not None]
    if any("values" in record or "violations" in record for record in completed):
        return set()
    told: dict[str, float] = {}
    for record in completed:
        network = record["replayed_from"] or record["trial"]
        told[network] = max(record["value"], told.get(network, record["value"]))
    best = sorted(told.values(), reverse=True)[:kept]
    return {
        record["trial"]
        for record in charged(completed)
        if not record["baseline"]
        and told[record["trial"]] < best[-1]
        and all((replay["value"] or 0.0) < best[0] for replay in record["replays"])
    }


def baseline(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The baseline's record, if it has finished."""
    return next((record for record in records if record["baseline"]), None)


def charged(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that count against a budget: those whose network was trained for them."""
    return [record for record in records if record["replayed_from"] is None]


def count(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many ended in each way."""
    found = Counter(record["status"] for record in records)
    return {status.value: found[status.value] for status in Status}


def reasons(records: Iterable[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(status, reason, how many) of the trials that did not complete, the most frequent first."""
    found = Counter((record["status"], record["reason"]) for record in records if record["reason"])
    return [(status, reason, count) for (status, reason), count in found.most_common()]
