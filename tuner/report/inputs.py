"""Reads a run directory into plain objects. Says what is missing; computes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.arrays import Array
from model.centre_lines import CentreLines
from model.counts import PixelCounts

Json = dict[str, Any]


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
    """The winner or the baseline: a trained network with its thresholds, and what it did to two splits."""

    trial: str
    config: Json
    epoch: int | None
    thresholds: Json
    value: Any
    validation: Split
    test: Split


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
    facts: Json
    """run.json"""
    records: list[Json]
    winner: Candidate
    baseline: Candidate | None
    """the winner itself where the search found nothing better; None where no baseline was judged"""
    examples: Examples
    architecture: dict[str, list[Json]]
    openings: list[Json]

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
    def is_baseline(self) -> bool:
        """Whether the search found nothing better than the baseline."""
        return self.baseline is not None and self.baseline.trial == self.winner.trial

    @property
    def objectives(self) -> list[Json]:
        objective = self.space.get("objective") or {"metric": "dice_mean", "mode": "max"}
        return objective if isinstance(objective, list) else [objective]

    def history_record(self) -> tuple[Json | None, bool]:
        """The record whose history stands for the winner, and whether it is the winner's own.

        The winner may be a repeat of a trial with another seed, which has no line among the records.
        """
        for record in self.records:
            if record["trial"] == self.winner.trial:
                return record, True
        for record in self.records:
            if _without_seed(record["config"]) == _without_seed(self.winner.config) and record["history"]:
                return record, False
        return None, False


def read(directory: Path) -> Run:
    """Raises ValueError that names what is missing and the command that makes it."""
    if not (directory / "run.json").is_file():
        raise ValueError(
            f"{directory} is no run directory: run.json is missing; give a folder that `tuner search` made"
        )
    evaluation = directory / "evaluation"
    _require(directory, ["selection.json"])
    selection = _json(evaluation / "selection.json")
    winner, baseline = selection["winner"], selection["baseline"]
    roles = ["winner"] + (["baseline"] if baseline is not None and baseline != winner else [])
    files = [f"{role}-{split}.npz" for role in roles for split in ("validation", "test")]
    _require(directory, [*files, "examples.npz", "architecture.json"])
    judged = {role: _candidate(evaluation, role, selection) for role in roles}
    return Run(
        facts=_json(directory / "run.json"),
        records=list(_json_lines(directory / "records.jsonl")),
        winner=judged["winner"],
        baseline=judged["winner"] if baseline == winner else judged.get("baseline"),
        examples=_examples(evaluation / "examples.npz"),
        architecture=_json(evaluation / "architecture.json"),
        openings=list(_json_lines(evaluation / "openings.jsonl")),
    )


def _require(directory: Path, names: list[str]) -> None:
    missing = [f"evaluation/{name}" for name in names if not (directory / "evaluation" / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} has no {', '.join(missing)}: the winner is not judged yet; "
            f"run `tuner finals {directory}` first"
        )


def _candidate(evaluation: Path, role: str, selection: Json) -> Candidate:
    trial = selection[role]
    chosen = selection["trials"][trial]
    return Candidate(
        trial=trial,
        config=chosen["config"],
        epoch=chosen["epoch"],
        thresholds=chosen["thresholds"],
        value=chosen["value"],
        validation=_split(evaluation / f"{role}-validation.npz"),
        test=_split(evaluation / f"{role}-test.npz"),
    )


def _split(path: Path) -> Split:
    with np.load(path, allow_pickle=False) as arrays:
        return Split(
            names=[str(name) for name in arrays["names"]],
            groups=[str(group) for group in arrays["groups"]],
            sources=[str(source) for source in arrays["sources"]],
            labels=arrays["labels"].astype(bool),
            decision_logits=arrays["decision_logits"].astype(np.float64),
            counts=PixelCounts.from_arrays(arrays),
            centre_lines=CentreLines(*arrays["centre_lines"].T),
        )


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
