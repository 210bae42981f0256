"""Curves of bench/strategies_real.py: trained when somebody looks, and what a trial would have seen all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.strategies import searched
from bench.strategies_real import CPU, ROWS, SPACE, RealCurves
from model import layouts, splits, synthetic
from model.data import open_cache
from model.evaluate import score
from tuner.space import DataOptions, Space
from tuner.trial import TrialTask

EPOCHS = 2
PARAMS = {"learning_rate": 0.5, "pixel_positive_weight": 2.0, "dilate": 3, "augment_brightness": 0.2}


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def space() -> Space:
    train = dict(SPACE.train) | {"epochs": EPOCHS, "precision": "float32"}
    return replace(SPACE, data=DataOptions(height=64, width=128), train=train)


@pytest.fixture
def found(tmp_path: Path) -> splits.Splits:
    synthetic.write(tmp_path / "set", count=12, height=64, width=128)
    return splits.assign(layouts.read(tmp_path / "set"), tmp_path / "set", 0.25, 0.25, 0)


@pytest.mark.slow
def test_a_curve_that_is_trained_piece_by_piece_is_that_of_a_trial(space: Space, found: splits.Splits) -> None:
    reports: list[dict[str, Any]] = []
    config = space.config(PARAMS, space.seed)
    task = TrialTask(found.train, found.validation, space.objective.metric, space.scheduler.compare, {})
    task.run(config, CPU, None, lambda progress, _: reports.append(json.loads(json.dumps(progress))))
    straight = reports[-1]

    curves = RealCurves(space, found)
    values = curves(PARAMS).values_E
    assert (len(values), curves.of(PARAMS).values) == (EPOCHS, [])  # nobody has looked
    begun = [values[0]]
    other = curves(PARAMS | {"learning_rate": 2.0}).values_E[:EPOCHS]  # another one trains in between
    assert len(curves.of(PARAMS).values) == 1
    assert [*begun, values[1]] == [row["value"] for row in straight["history"]]
    assert values[:EPOCHS].max() == straight["value"]
    assert list(other) != list(values[:EPOCHS])
    trained = curves.of(PARAMS)
    assert trained.thresholds.to_dict() == straight["thresholds"]
    validation = open_cache(found.validation, space.data.height, space.data.width)
    assert trained.dice_on(validation) == straight["value"]  # the weights are those of the best epoch
    assert score(trained.best_network, validation, config, CPU).choose(config.judgement()) == trained.thresholds


@pytest.mark.slow
def test_what_was_trained_for_one_strategy_is_not_trained_again(space: Space, found: splits.Splits) -> None:
    curves = RealCurves(space, found)
    row = ROWS[0]
    first, (pick,) = searched(row, space, curves, (3,), 2)
    epochs = {key: len(trained.values) for key, trained in curves.trained.items()}
    assert sum(epochs.values()) == first.epochs == 3 * EPOCHS
    again, (same,) = searched(row, space, curves, (3,), 2)
    assert {key: len(trained.values) for key, trained in curves.trained.items()} == epochs
    assert pick is not None
    assert same is not None
    assert (same.params, same.value) == (pick.params, pick.value)
    assert len(again.trials) == len(first.trials)


def test_what_diverges_has_no_finite_values_from_then_on(space: Space, found: splits.Splits) -> None:
    values = RealCurves(space, found)(PARAMS | {"learning_rate": 100.0}).values_E
    assert np.isnan(values[-1])
