"""Trials with cross-validation: real trainings on a small set, and what is made of many of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from model import checkpoint, layouts, splits, synthetic, train
from model.config import Judgement, RunConfig
from model.data import cached, open_cache
from model.evaluate import score
from model.splits import Splits
from model.thresholds import Thresholds
from tests.tuner.conftest import small_space
from tests.tuner.test_trial import Reports
from tuner import nested
from tuner.folds import FoldsTask, may_be_median, task_of
from tuner.run import checked_splits
from tuner.space import Space
from tuner.trial import TrialTask, weights_folder

CPU = torch.device("cpu")
SIZE = (64, 128)


def space(**parts: Any) -> Space:
    train = {"width": 0.1, "epochs": 2, "precision": "float32", "learning_rate": 1.0}
    search = {
        "dilate": {"type": "int", "low": 1, "high": 3, "step": 2},
        "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
    }
    return small_space(**{"train": train, "search": search, "cross_validation": {"folds": 3}} | parts)


NESTED = {"cross_validation": {"folds": 3, "nested": True}}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Splits:
    folder = tmp_path_factory.mktemp("folds") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return splits.assign(layouts.read(folder), folder, 0.25, 0.25, 0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path_factory.getbasetemp() / "folds-cache"))


def config_of(wanted: Space, **params: Any) -> RunConfig:
    return wanted.config({"dilate": 1, "threshold_rule": "grid"} | params, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trial_is_the_mean_of_separate_trainings(found: Splits, tmp_path: Path) -> None:
    wanted = space(constraints=[{"metric": "recall", "min": 0.1}])
    task, config = task_of(wanted, found), config_of(wanted, dilate=3)
    reports = Reports(tmp_path)
    task.run(config, CPU, None, reports)
    assert isinstance(task, FoldsTask)
    assert [p["status"] for p in reports.progress] == ["running", "running", "completed"]
    last = reports.progress[-1]
    alone = []
    for n, fold in enumerate(task.folds):  # each with caches of its own
        plain = TrialTask.of(wanted, [task.pool[r] for r in fold.train], [task.pool[r] for r in fold.validation])
        (tmp_path / f"alone-{n}").mkdir()
        own = Reports(tmp_path / f"alone-{n}")
        plain.run(config, CPU, None, own)
        alone.append(own.progress[-1])
    values = [one["value"] for one in alone]
    assert [(f["value"], f["epoch"], f["thresholds"]) for f in last["folds"]] == [
        (one["value"], one["best_epoch"], one["thresholds"]) for one in alone
    ]
    assert last["value"] == fmean(values)
    assert [row["fold_value"] for row in last["history"]] == values
    assert [row["value"] for row in last["history"]] == [fmean(values[: n + 1]) for n in range(3)]
    assert [row["epoch"] for row in last["history"]] == [1, 2, 3]
    for rule in last["rules"]:
        assert last["rules"][rule] == fmean(one["rules"][rule] for one in alone)
    for n, replay in enumerate(last["replays"]):
        theirs = [one["replays"][n] for one in alone]
        assert Judgement.of(replay) == Judgement.of(theirs[0])
        assert replay["value"] == fmean(one["value"] for one in theirs)
        assert replay["figures"]["recall"] == fmean(one["figures"]["recall"] for one in theirs)
        middle = sorted(one["value"] for one in theirs)[1]
        assert theirs[replay["fold"] - 1]["value"] == middle
        assert (replay["epoch"], replay["thresholds"]) == tuple(
            theirs[replay["fold"] - 1][key] for key in ("epoch", "thresholds")
        )
    assert (last["best_epoch"], last["fold"]) == (last["replays"][0]["epoch"], last["replays"][0]["fold"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_handed_over_gives_its_fold_s_value(found: Splits, tmp_path: Path) -> None:
    wanted = space()
    task, config = task_of(wanted, found), config_of(wanted)
    assert isinstance(task, FoldsTask)
    reports = Reports(tmp_path)
    task.run(config, CPU, None, reports)
    last, final = reports.progress[-1], tmp_path / "3"
    assert checkpoint.is_whole(final)
    kept = set()
    for replay in last["replays"]:
        if Judgement.of(replay) in task.plain.judgements(config):
            folder = weights_folder(replay["epoch"], replay["fold"])
            kept.add(folder)
            network, _, _ = checkpoint.load_model(final / folder, CPU)
            rows = task.folds[replay["fold"] - 1].validation
            cache = open_cache(task.pool, *SIZE).part(rows, [task.pool[row] for row in rows])
            figures = score(network, cache, config, CPU).figures([Thresholds.from_dict(replay["thresholds"])])[0]
            assert figures["dice_mean"] == pytest.approx(replay["folds"][replay["fold"] - 1]["value"], abs=1e-12)
    assert {f"best/{path.name}" for path in (final / "best").iterdir()} == kept
    assert len(list((final / "previews").glob("*.png"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trial_that_is_killed_goes_on_after_its_last_fold(found: Splits, tmp_path: Path, monkeypatch) -> None:
    wanted = space(**NESTED)
    task, config = task_of(wanted, found), config_of(wanted)
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    straight, resumed = Reports(tmp_path / "straight"), Reports(tmp_path / "resumed")
    task.run(config, CPU, None, straight)
    begun = []
    start = train.start
    monkeypatch.setattr(train, "start", lambda *args: begun.append(1) or start(*args))
    task.run(config, CPU, tmp_path / "straight" / "1", resumed)
    assert len(begun) == len(resumed.progress) == 2
    assert resumed.progress[-1] | {"seconds": 0} == straight.progress[-1] | {"seconds": 0}
    again = Reports(tmp_path)
    task.run(config, CPU, tmp_path / "straight" / "3", again)
    assert [p["status"] for p in again.progress] == ["completed"]
    assert len(begun) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_outer_fold_is_only_scored(found: Splits, tmp_path: Path) -> None:
    wanted = space(**NESTED)
    task, config = task_of(wanted, found), config_of(wanted)
    assert isinstance(task, FoldsTask)
    reports = Reports(tmp_path)
    task.run(config, CPU, None, reports)
    last = reports.progress[-1]
    n = last["fold"] - 1
    fold = task.folds[n]
    assert not {*fold.outer} & {*fold.train, *fold.validation}
    network, _, _ = checkpoint.load_model(tmp_path / "3" / weights_folder(last["best_epoch"], last["fold"]), CPU)
    whole = open_cache(task.pool, *SIZE)
    for rows, key in ((fold.validation, "value"), (fold.outer, "outer")):
        cache = whole.part(rows, [task.pool[row] for row in rows])
        figures = score(network, cache, config, CPU).figures([Thresholds.from_dict(last["thresholds"])])[0]
        assert figures["dice_mean"] == pytest.approx(last["folds"][n][key], abs=1e-12)
    assert all("outer" in fold for fold in last["folds"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_five_folds_decode_the_set_once(found: Splits, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []

    def reading(path: Path) -> bytes:
        read.append(path)
        return path.read_bytes()

    wanted = space(cross_validation={"folds": 5})
    task = task_of(wanted, found, reading)
    assert isinstance(task, FoldsTask)
    (tmp_path / "trial").mkdir()
    task.run(replace(config_of(wanted, dilate=3), epochs=1), CPU, None, Reports(tmp_path / "trial"))
    images = [sample.image for sample in task.pool]
    assert sorted(path for path in read if path in images) == sorted(images)
    assert len(cached(tmp_path / "cache")) == 1
    masks = [sample.mask for sample in task.pool if sample.mask]
    assert sorted(path for path in read if path in masks) == sorted(2 * masks)  # as they are, and dilated
    task.run(replace(config_of(wanted, dilate=3), epochs=1), CPU, None, Reports(tmp_path))
    assert len(read) == len(images) + 2 * len(masks)


def test_a_part_of_a_cache_is_a_view(found: Splits) -> None:
    whole = open_cache(found.train, *SIZE)
    rows = [5, 0, 3]
    part = whole.part(rows, [found.train[row] for row in rows])
    assert part.images.shape == (3, *whole.images.shape[1:])
    for n, row in enumerate(rows):
        assert np.array_equal(part.images[n], whole.images[row])
        assert np.array_equal(part.targets(5)[n], whole.targets(5)[row])
        assert np.shares_memory(part.images[n], whole.images[row])
    assert np.array_equal(part.masks[0:2], whole.masks[[5, 0]])
    assert part.positive.tolist() == [found.train[row].positive for row in rows]
    assert part.original_sizes.tolist() == whole.original_sizes[rows].tolist()
    again = part.part([2], [part.samples[2]])
    assert np.array_equal(again.targets(5)[0], whole.targets(5)[3])


@pytest.mark.slow
def test_a_fold_that_diverges_ends_its_trial(found: Splits, tmp_path: Path, monkeypatch) -> None:
    wanted = space()
    task, config = task_of(wanted, found), config_of(wanted)
    epochs = []
    train_epoch = train.train_epoch

    def diverge(*args: Any) -> dict[str, float]:
        epochs.append(1)
        if len(epochs) > 2:
            raise train.TrainingDiverged("the loss of epoch 1 is not a finite number")
        return train_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", diverge)
    reports = Reports(tmp_path)
    task.run(config, CPU, None, reports)
    assert [(p["status"], p["reason"]) for p in reports.progress] == [
        ("running", None),
        ("diverged", "fold 2: the loss of epoch 1 is not a finite number"),
    ]
    assert reports.progress[-1]["epochs"] == 1


def test_a_space_without_folds_has_plain_trials(found: Splits) -> None:
    plain = small_space()
    assert isinstance(task_of(plain, found), TrialTask)
    assert "cross_validation" not in plain.to_dict()


def test_data_that_cannot_be_dealt_are_refused_before_there_is_a_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    synthetic.write(tmp_path / "set", count=24, height=64, width=128)
    with pytest.raises(
        ValueError, match=r"20 folds need at least as many groups with positive images.*lower cross_val"
    ):
        checked_splits(space(cross_validation={"folds": 20}), tmp_path / "set")
    masks = {"num_segmented": {"type": "int", "low": 2, "high": 8}}
    checked_splits(space(search=masks), tmp_path / "set")
    with pytest.raises(ValueError, match=r"num_segmented must be at most .* training images with a mask"):
        checked_splits(space(search=masks, cross_validation={"folds": 3, "nested": True}), tmp_path / "set")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_only_what_can_still_be_the_median_is_kept(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(200):
        values = rng.integers(0, 4, count).tolist()
        median = sorted(range(count), key=lambda n: (values[n], n))[(count - 1) // 2]
        assert may_be_median(values, count) == [median]
        for done in range(1, count):
            assert median in may_be_median(values[:done], count) or median >= done
    assert may_be_median([0.1, 0.2, 0.3, 0.4], 5) == [1, 2]


# Nested


def trial(name: str, inner: list[float], outer: list[float] | None, status: str = "completed") -> dict[str, Any]:
    folds = [{"value": value} for value in inner]
    if outer:
        folds = [fold | {"outer": value} for fold, value in zip(folds, outer, strict=True)]
    return {"trial": name, "status": status, "folds": folds}


def test_each_fold_scores_what_was_chosen_without_it() -> None:
    records = [
        trial("a", [0.9, 0.2, 0.5], [0.3, 0.9, 0.6]),
        trial("b", [0.1, 0.8, 0.5], [0.9, 0.4, 0.8]),
        trial("stopped", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "stopped_early"),
    ]
    found = nested.score(records)
    assert found is not None
    assert [fold["trial"] for fold in found["folds"]] == ["a", "b", "a"]  # of equals the earlier one
    assert [fold["outer"] for fold in found["folds"]] == [0.3, 0.4, 0.6]
    assert found["value"] == pytest.approx(1.3 / 3)  # by the outer values themselves it would be 0.9 + 0.9 + 0.8
    assert found["inner"] == pytest.approx(2.2 / 3)
    half = 4.302653 * np.std([0.3, 0.4, 0.6], ddof=1) / np.sqrt(3)
    assert found["ci95"] == pytest.approx([1.3 / 3 - half, 1.3 / 3 + half])
    assert found["trials"] == 2


def test_choosing_among_equals_gains_nothing_when_nested() -> None:
    """Trials that are all worth 0.5: the best mean and choosing on outer values promise more, the nested score not."""
    rng = np.random.default_rng(0)
    scores, promised, peeked = [], [], []
    for _ in range(200):
        inner, outer = rng.normal(0.5, 0.05, (2, 30, 5))
        found = nested.score([trial(str(n), [*inner[n]], [*outer[n]]) for n in range(30)])
        assert found is not None
        scores.append(found["value"])
        promised.append(inner.mean(axis=1).max())
        peeked.append(outer.max(axis=0).mean())
    assert np.mean(scores) == pytest.approx(0.5, abs=0.006)
    assert np.mean(promised) > 0.53
    assert np.mean(peeked) > 0.58


def test_without_outer_values_there_is_no_nested_score() -> None:
    assert nested.score([]) is None
    assert nested.score([trial("a", [0.5, 0.5], None)]) is None
    assert nested.score([{"trial": "b", "status": "completed"}]) is None
