"""The trace of a trial: what is in it, and that the trial does not notice."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import folds
from model.config import CrossValidation
from tests.tuner.test_session import nodes, session_of  # noqa: F401
from tests.tuner.test_trial import CONFIG, Reports, cache_folder, task  # noqa: F401
from tuner import tracing
from tuner.folds import FoldsTask
from tuner.trial import TrialTask

PARTS = {"training step", "validation", "thresholds", "weights", "training state", "checkpoint", "report"}


def marks(data: bytes) -> dict[str, list[tuple[float, float]]]:
    """When each marked part of a trace began, and how long it took."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in json.loads(gzip.decompress(data))["traceEvents"]:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((float(event["ts"]), float(event["dur"])))
    return found


def run(task: TrialTask, folder: Path, epochs: int, resume: Path | None = None) -> Reports:  # noqa: F811
    folder.mkdir(exist_ok=True)
    reports = Reports(folder)
    task.run(replace(CONFIG, epochs=epochs), torch.device("cpu"), resume, reports)
    return reports


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_trial_that_is_traced_computes_the_same(task: TrialTask, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(tracing, "STEPS", 5)
    (trace := tmp_path / "trace").mkdir()
    plain, traced = run(task, tmp_path / "plain", 3), run(task.traced(trace), tmp_path / "traced", 3)
    for reports in (plain, traced):
        for progress in reports.progress:
            del progress["seconds"]
    assert traced.progress == plain.progress
    best = f"3/best/{plain.progress[-1]['best_epoch']}/model.safetensors"
    ours, theirs = load_file(plain.folder / best), load_file(traced.folder / best)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found = tracing.files(trace)
    seen = marks(found[tracing.TRACE])
    assert seen.keys() >= PARTS
    steps, [validation], [report] = (sorted(seen[name]) for name in ("training step", "validation", "report"))
    assert len(steps) == 5
    assert steps[-1][0] + steps[-1][1] <= validation[0] <= report[0]
    said = found[tracing.SUMMARY].decode()
    assert said.startswith("epoch 2 on ")  # the first has too few steps to be warm
    assert all(name in said for name in PARTS)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_only_epoch_of_a_trial_is_traced_before_its_last_report(task: TrialTask, tmp_path: Path) -> None:  # noqa: F811
    (trace := tmp_path / "trace").mkdir()
    there: list[bool] = []
    task.traced(trace).run(
        replace(CONFIG, epochs=1), torch.device("cpu"), None, lambda *_: there.append(bool(tracing.files(trace)))
    )
    assert there == [True]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_of_several_folds_the_first_training_is_traced(task: TrialTask, tmp_path: Path) -> None:  # noqa: F811
    pool = [*task.train, *task.validation]
    of_folds = FoldsTask(replace(task, train=[], validation=[]), pool, folds.deal(pool, CrossValidation(folds=2), 0))
    (trace := tmp_path / "trace").mkdir()
    times: list[int] = []

    def report(progress: dict[str, Any], _folder: Path | None) -> None:
        times.append((trace / tracing.SUMMARY).stat().st_mtime_ns)

    of_folds.traced(trace).run(replace(CONFIG, epochs=1), torch.device("cpu"), None, report)
    assert len(times) == 2
    assert len(set(times)) == 1


def test_a_training_that_fails_leaves_no_trace(task: TrialTask, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    (trace := tmp_path / "trace").mkdir()

    def broken(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr("tuner.trial.score", broken)
    with pytest.raises(ValueError, match="broken"):
        run(task.traced(trace), tmp_path / "trial", 1)
    assert not list(trace.iterdir())


def test_the_first_trial_is_traced_and_another_if_it_is_lost(nodes, tmp_path: Path) -> None:  # noqa: F811
    session = session_of(tmp_path, profile=True)
    first, second = session.next("1"), session.next("2")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert (first["traced"], second["traced"]) == (True, False)
    session.ended("1", crashed=True)
    again = session.next("3")
    assert isinstance(again, dict)
    assert again["traced"]
    session.traced("3", {tracing.TRACE: b"trace", tracing.SUMMARY: b"epoch 1"})
    assert (tmp_path / "profile" / tracing.SUMMARY).read_text() == f"trial {again['trial']}, epoch 1"
    session.ended("3", crashed=True)
    fourth = session.next("4")
    assert isinstance(fourth, dict)
    assert not fourth["traced"]
