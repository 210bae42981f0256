"""Which configuration is chosen of hand-made records."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import RunConfig
from tuner import selection
from tuner.space import Constraint


def record(trial: str, value: float | None, learning_rate: float = 1.0, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A completed trial of the search."""
    judging = {name: more.pop(name) for name in ("threshold_rule",) if name in more}
    config = RunConfig(learning_rate=learning_rate, seed=seed, **judging)
    return {
        "trial": trial, "seed": seed, "status": "completed", "value": value, "config": config.to_dict(),
        "replayed_from": None, "device_seconds": 10.0, "history": [], "replays": [], "best_epoch": 1, "drawn": "model",
        "baseline": False,
    } | more  # fmt: skip


def repeat(of: dict[str, Any], value: float | None, seed: int, **more: Any) -> dict[str, Any]:
    return of | {"trial": f"{of['trial']}-{seed}", "repeats": of["trial"], "value": value, "seed": seed} | more


def test_a_lucky_single_training_loses_to_one_that_holds() -> None:
    search = [record("a", 0.72, 0.1), record("b", 0.70, 0.2), record("c", 0.60, 0.3)]
    alone = selection.select(search, [])
    assert alone is not None
    assert alone.contenders[alone.winner].trial == "a"
    assert not alone.is_repeated
    again = [repeat(search[0], value, seed) for seed, value in ((1, 0.66), (2, 0.665), (3, 0.66))]
    again += [repeat(search[1], value, seed) for seed, value in ((1, 0.70), (2, 0.705), (3, 0.70))]
    found = selection.select(search, again)
    assert found is not None
    assert found.contenders[found.winner].trial == "b"
    assert found.is_repeated
    assert found.contenders[0].values == [0.72, 0.66, 0.665, 0.66]


def test_the_ways_of_judging_one_network_are_one_contender_by_the_best_of_them() -> None:
    search = [
        record("a", 0.70, 0.1),
        record("b", 0.71, 0.1, threshold_rule="grid", replayed_from="a", device_seconds=0.0),
        record("c", 0.60, 0.2),
    ]
    found = selection.select(search, [])
    assert found is not None
    assert [one.trial for one in found.contenders] == ["b", "c"]
    assert (found.index("a"), found.index("b")) == (None, 0)
    assert (found.judged_otherwise("a"), found.judged_otherwise("c")) == (0, None)
    assert found.contenders[0].cost == 10.0


def test_one_that_diverges_with_another_seed_is_out_and_crashes_say_nothing() -> None:
    search = [record("a", 0.72, 0.1), record("b", 0.70, 0.2)]
    again = [repeat(search[0], None, 1, status="diverged"), repeat(search[1], None, 1, status="failed")]
    found = selection.select(search, again)
    assert found is not None
    assert [one.trial for one in found.contenders] == ["b"]
    assert [(one.trial, one.diverged) for one in found.out] == [("a", 1)]
    # Where nobody is left, the search's own trainings must do.
    last = selection.select(search[:1], again)
    assert last is not None
    assert last.fell_back
    assert last.is_repeated
    assert [one.trial for one in last.contenders] == [one.trial for one in last.out] == ["a"]


def test_constraints_hold_for_the_mean_over_seeds() -> None:
    bound = Constraint(metric="recall", min=0.8)

    def with_recall(recall: float) -> dict[str, Any]:
        return {"violations": {"recall": max(0.0, 0.8 - recall)}, "history": [{"epoch": 1, "recall": recall}]}

    search = [
        record("a", 0.72, 0.1, **with_recall(0.81)),
        record("b", 0.70, 0.2, **with_recall(0.90)),
        record("c", 0.90, 0.3, **with_recall(0.5)),
    ]
    again = [repeat(search[0], 0.73, 1, **with_recall(0.70)), repeat(search[1], 0.70, 1, **with_recall(0.79))]
    found = selection.select(search, again, [bound])
    assert found is not None
    assert [one.trial for one in found.contenders] == ["b"]
    assert [(one.trial, one.beyond) for one in found.out] == [("a", ("recall",))]
    assert selection.select(search[2:], [], [bound]) is None


def test_the_cheapest_is_taken_among_those_that_cannot_be_told_from_the_best() -> None:
    search = [
        record("dear", 0.700, 0.1, device_seconds=90.0),
        record("cheap", 0.698, 0.2, device_seconds=10.0),
        record("poor", 0.300, 0.3, device_seconds=1.0),
    ]
    values = {"dear": (0.699, 0.707), "cheap": (0.706, 0.697), "poor": (0.301, 0.299)}
    again = [repeat(one, value, seed) for one in search for seed, value in enumerate(values[one["trial"]], start=1)]
    best = selection.select(search, again)
    cheapest = selection.select(search, again, prefer="cheapest")
    assert best is not None
    assert cheapest is not None
    assert best.contenders[best.winner].trial == "dear"
    assert cheapest.contenders[cheapest.winner].trial == "cheap"
    assert [cheapest.contenders[n].trial for n in cheapest.alike] == ["dear", "cheap"]
    # What nobody has looked at twice is like the best for want of knowledge alone.
    unknown = selection.select(search, [one for one in again if one["repeats"] != "cheap"], prefer="cheapest")
    assert unknown is not None
    assert unknown.contenders[unknown.winner].trial == "dear"


def test_random_search_is_judged_by_what_was_drawn_at_random() -> None:
    values = [0.5, 0.55, 0.6, 0.52, 0.58, 0.57]
    search = [record(f"r{n}", value, 0.1 + n, drawn="random") for n, value in enumerate(values)]
    search += [record("s", None, 9.0, status="stopped_early", drawn="random", device_seconds=5.0)]
    search += [record(f"m{n}", 0.75, 20.0 + n) for n in range(4)]
    again = [repeat(search[-1], 0.75, seed) for seed in (1, 2, 3)]
    found = selection.select(search, again)
    assert found is not None
    told = selection.against_random(found, found.winner, search, again)
    assert told is not None
    assert (told.trainings, told.told_by, told.worse) == (14, 6, 1)  # 10 + 3 + a half of one
    assert told.value_interval[0] < told.value < told.value_interval[1]
    assert told.gain_interval[0] > 0
    assert selection.against_random(found, 0, [one for one in search if one["drawn"] != "random"], again) is None


@pytest.mark.parametrize("status", ["failed", "diverged", "stopped_early"])
def test_nothing_is_selected_where_nothing_completed(status: str) -> None:
    assert selection.select([record("a", 0.5, status=status)], []) is None
