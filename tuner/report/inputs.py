"""Reads a run directory into plain objects. Says what is missing; computes nothing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from model.arrays import Array
from model.centre_lines import CentreLines
from model.counts import PixelCounts
from tuner import records
from tuner.selection import Selection, select
from tuner.space import Constraint

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """N judged images of one split."""

    names: list[str]
    groups: list[str]
    sources: list[str]
    labels: Array
    """(N,) bool"""
    decision_logits: Array
    """(N,)"""
    counts: PixelCounts
    centre_lines: CentreLines
    """of truth and mask, at the candidate's thresholds"""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Candidate:
    """The winner or the baseline: a trained network with its thresholds."""

    trial: str
    config: Json
    epoch: int | None
    thresholds: Json
    value: Any
    violations: Json | None
    """how far beyond each constraint; None where there is none"""
    fold: int | None = None
    """which of its trial's folds judged this network; None where it has none"""

    @property
    def is_beyond(self) -> bool:
        """Whether it violates a constraint."""
        return any((self.violations or {}).values())


@dataclass(frozen=True)
class EvaluatedCandidate(Candidate):
    """With what it did to two splits."""

    validation: Split = field(kw_only=True)
    test: Split = field(kw_only=True)


@dataclass(frozen=True)
class Examples:
    """K test images with the winner's answers."""

    names: list[str]
    image: Array
    """(K, H, W, 3) uint8"""
    truth: Array
    """(K, H, W) bool"""
    probability: Array
    """(K, H, W)"""
    mask: Array
    """(K, H, W) bool"""


@dataclass(frozen=True)
class Run:
    """A search, whether or not its winner was evaluated."""

    facts: Json
    """run.json"""
    records: list[Json]
    openings: list[Json]
    importance: Json | None
    """importance.json; None where no search has written it"""
    repeats: list[Json]
    """repeats.jsonl: trainings of the search's best configurations with further seeds"""

    @property
    def data(self) -> Json:
        data: Json = self.facts["data"]
        return data

    @property
    def space(self) -> Json:
        space: Json = self.facts["space"]
        return space

    @property
    def searched(self) -> dict[str, Json]:
        """The searched parameters, in the order of the space."""
        return self.space.get("search") or {}

    @property
    def has_negatives(self) -> bool:
        return bool(self.data["has_negatives"])

    @property
    def objectives(self) -> list[Json]:
        objective = self.space.get("objective") or {"metric": "dice_mean", "mode": "max"}
        return objective if isinstance(objective, list) else [objective]

    @property
    def constraints(self) -> list[Json]:
        return self.space.get("constraints") or []

    @cached_property
    def selection(self) -> Selection | None:
        """What all trainings say of the configurations; None where none has completed that may win."""
        asked = self.facts.get("repeats") or self.space.get("repeats") or {}
        bounds = [Constraint(**one) for one in self.constraints]
        return select(self.records, self.repeats, bounds, asked.get("prefer", "best"))

    @property
    def folds(self) -> int | None:
        """How many trainings a trial is; None where it is one."""
        cross_validation = self.space.get("cross_validation")
        return cross_validation["folds"] if cross_validation else None

    @property
    def unit(self) -> str:
        """What a trial reports one of."""
        return "fold" if self.folds else "epoch"

    def trial_length(self, record: Json) -> int:
        """How many of them a whole trial reports."""
        length: int = self.folds or record["config"]["epochs"]
        return length

    @property
    def best_record(self) -> Json | None:
        """The record of the best completed trial, or of the one nearest to the constraints; None if none has
        completed."""
        return records.nearest(self.records) or records.best(self.records)

    @property
    def chosen(self) -> Candidate | None:
        """The trial that the report is about; None if none has completed."""
        record = self.best_record
        return None if record is None else _of_record(record)

    @property
    def compared_with(self) -> Candidate | None:
        """The baseline, if it has completed."""
        record = records.baseline(self.records)
        return None if record is None or record["status"] != "completed" else _of_record(record)

    def history_record(self) -> tuple[Json | None, bool]:
        """The record whose history stands for the chosen trial, and whether it is its own."""
        return self.best_record, True


@dataclass(frozen=True)
class EvaluatedRun(Run):
    """A search whose winner was evaluated."""

    winner: EvaluatedCandidate
    baseline: EvaluatedCandidate | None
    """the winner itself where the search found nothing better; None where no baseline was judged"""
    examples: Examples
    architecture: dict[str, list[Json]]
    configuration: str
    """the search's trial whose configuration has won; of single trainings the winner itself"""
    seeds: list[Json]
    """trial, seed and objective on validation and test of the networks of winner and baseline, where one has several"""

    @property
    def chosen(self) -> Candidate:
        return self.winner

    @property
    def compared_with(self) -> Candidate | None:
        return self.baseline

    @property
    def is_baseline(self) -> bool:
        """Whether the search found nothing better than the baseline."""
        return self.baseline is not None and self.baseline.trial == self.winner.trial

    def history_record(self) -> tuple[Json | None, bool]:
        """The winner may be a repeat of a trial with another seed, which older runs have no record of."""
        for record in (*self.records, *self.repeats):
            if record["trial"] == self.winner.trial:
                return record, True
        for record in self.records:
            if _without_seed(record["config"]) == _without_seed(self.winner.config) and record["history"]:
                return record, False
        return None, False


def read(directory: Path, evaluation: str = "evaluation") -> Run:
    """Reads a run with one of its evaluations, if that is there. ValueError that names what is missing or broken and
    the way out."""
    if not (directory / "run.json").is_file():
        raise ValueError(
            f"{directory} is no run directory: run.json is missing; give a folder that `tuner search` made"
        )
    search = Run(
        facts=_json(directory / "run.json"),
        records=list(_json_lines(directory / "records.jsonl")),
        openings=list(_json_lines(directory / "evaluation" / "openings.jsonl")),
        importance=_importance(directory),
        repeats=list(_json_lines(directory / "repeats.jsonl")),
    )
    folder = directory / evaluation
    if not (folder / "selection.json").is_file():
        return search
    way_out = f"remove {folder / 'selection.json'} and run `tuner finals {directory}`, which opens the test split again"
    selection = _parsed(folder / "selection.json", lambda path: _selection(_json(path)), way_out)
    winner, baseline = selection["winner"], selection["baseline"]
    roles = ["winner"] + (["baseline"] if baseline is not None and baseline != winner else [])
    files = [f"{role}-{split}.npz" for role in roles for split in ("validation", "test")]
    _require(folder, [*files, "examples.npz", "architecture.json"], way_out)
    judged = {role: _candidate(folder, role, selection, way_out) for role in roles}
    return EvaluatedRun(
        search.facts,
        search.records,
        search.openings,
        search.importance,
        search.repeats,
        winner=judged["winner"],
        baseline=judged["winner"] if baseline == winner else judged.get("baseline"),
        examples=_parsed(folder / "examples.npz", _examples, way_out),
        architecture=_parsed(folder / "architecture.json", _architecture, way_out),
        configuration=str(selection.get("configuration", winner)),
        seeds=selection.get("seeds", []),
    )


def read_evaluated(directory: Path) -> EvaluatedRun:
    """The same of a run whose winner was evaluated. ValueError for another."""
    run = read(directory)
    if not isinstance(run, EvaluatedRun):
        raise ValueError(
            f"{directory} has no evaluation/selection.json: its winner is not evaluated yet; "
            f"run `tuner finals {directory}` first"
        )
    return run


def _importance(directory: Path) -> Json | None:
    """None where no search has written it, or it is of another state of the records."""
    path = directory / "importance.json"
    if not path.is_file():
        return None

    def parse(path: Path) -> Json:
        found: Json = _json(path)
        for key in ("epoch", "trials", "best", "parameters", "records"):
            found[key]
        return found

    return _parsed(path, parse, f"remove it; `tuner resume {directory}` writes it again")


def _require(folder: Path, names: list[str], way_out: str) -> None:
    missing = [f"{folder.name}/{name}" for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder.parent} has no {', '.join(missing)}; {way_out}")


def _parsed(path: Path, parse: Callable[[Path], T], way_out: str) -> T:
    """ValueError for a file that is cut short, was changed or is of another version."""
    try:
        return parse(path)
    except (OSError, EOFError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is broken or of another version ({type(error).__name__}: {error}); {way_out}"
        ) from error


def _selection(found: Json) -> Json:
    for trial in {found["winner"], found["baseline"]} - {None}:
        for key in ("config", "epoch", "thresholds", "value"):
            found["trials"][trial][key]
    return found


def _of_record(record: Json) -> Candidate:
    return Candidate(
        trial=record["trial"],
        config=record["config"],
        epoch=record["best_epoch"],
        thresholds=record["thresholds"],
        value=record["value"],
        violations=record.get("violations"),
        fold=record.get("fold"),
    )


def _candidate(folder: Path, role: str, selection: Json, way_out: str) -> EvaluatedCandidate:
    trial = selection[role]
    chosen = selection["trials"][trial]

    def split(path: Path) -> Split:
        return _split(path, chosen["thresholds"])

    return EvaluatedCandidate(
        trial=trial,
        config=chosen["config"],
        epoch=chosen["epoch"],
        thresholds=chosen["thresholds"],
        value=chosen["value"],
        violations=chosen.get("violations"),
        fold=chosen.get("fold"),
        validation=_parsed(folder / f"{role}-validation.npz", split, way_out),
        test=_parsed(folder / f"{role}-test.npz", split, way_out),
    )


def _split(path: Path, thresholds: Json) -> Split:
    """ValueError unless it was judged at these thresholds and its arrays are of one length and hold numbers."""
    with np.load(path, allow_pickle=False) as arrays:
        if json.loads(str(arrays["thresholds"])) != thresholds:
            raise ValueError(f"it was judged at {arrays['thresholds']}, selection.json says {json.dumps(thresholds)}")
        found = Split(
            names=[str(name) for name in arrays["names"]],
            groups=[str(group) for group in arrays["groups"]],
            sources=[str(source) for source in arrays["sources"]],
            labels=arrays["labels"].astype(bool),
            decision_logits=arrays["decision_logits"].astype(np.float64),
            counts=PixelCounts.from_arrays(arrays),
            centre_lines=CentreLines(*arrays["centre_lines"].T),
        )
    parts = (found.groups, found.sources, found.labels, found.decision_logits, found.counts, found.centre_lines.truth)
    if any(len(part) != len(found) for part in parts) or not np.isfinite(found.decision_logits).all():
        raise ValueError("its arrays must have one entry an image and hold numbers")
    return found


def _architecture(path: Path) -> dict[str, list[Json]]:
    found = _json(path)
    return {name: list(found[name]) for name in ("original", "used")}


def _examples(path: Path) -> Examples:
    with np.load(path, allow_pickle=False) as arrays:
        return Examples(
            names=[str(name) for name in arrays["names"]],
            image=arrays["image"],
            truth=arrays["truth"].astype(bool),
            probability=arrays["probability"].astype(np.float32),
            mask=arrays["mask"].astype(bool),
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); it was changed by hand or cut short") from error


def _json_lines(path: Path) -> Iterator[Json]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}); `tuner resume` writes it again from the study"
                ) from error


def _without_seed(config: Json) -> Json:
    return {name: value for name, value in config.items() if name != "seed"}
