"""How much parameters mattered, on records whose values are known to come from some of them."""

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.tuner.conftest import small_space
from tuner import importance

SEARCH = {
    "learning_rate": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
    "augment_brightness": {"type": "float", "low": 0.0, "high": 0.5},
    "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
    "threshold_factor": {"type": "int", "low": 1, "high": 4, "when": {"threshold_rule": ["pr_curve"]}},
    "optimizer": {"type": "categorical", "choices": ["sgd"]},
}
SPACE = small_space(search=SEARCH, train={"epochs": 9})
WITH_RUNGS = small_space(search=SEARCH, train={"epochs": 9}, scheduler={"name": "asha", "min_epochs": 3})


def make(count: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Trials whose values come from the learning rate alone, and a little luck."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        params: dict[str, Any] = {"learning_rate": float(10 ** rng.uniform(-2, 0)), "optimizer": "sgd"}
        params |= {"augment_brightness": float(rng.uniform(0, 0.5)), "threshold_rule": ["pr_curve", "grid"][number % 2]}
        if params["threshold_rule"] == "pr_curve":
            params["threshold_factor"] = int(rng.integers(1, 5))
        value = 0.6 + 0.2 * math.log10(params["learning_rate"]) + float(rng.normal(0, 0.01))
        records.append(
            {
                "params": params,
                "status": "completed",
                "value": value,
                "replayed_from": None,
                "history": [{"epoch": epoch, "value": value * epoch / 9} for epoch in range(1, 10)],
            }
            | more
        )
    return records


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return importance.of(SPACE, make(40))


def test_what_decides_is_told_from_what_does_not(found) -> None:
    rows = {row["name"]: row for row in found["parameters"]}
    assert next(iter(rows)) == "learning_rate"
    assert {name for name, row in rows.items() if row["importance"] > row["chance"]} == {"learning_rate"}
    assert sum(row["importance"] for row in rows.values()) == pytest.approx(1)
    assert all(0 <= row["ci90"][0] <= row["importance"] <= row["ci90"][1] <= 1 for row in rows.values())
    assert (found["epoch"], found["trials"], found["best"], found["metric"]) == (None, 40, 8, "dice_mean")


def test_what_never_varies_is_left_out_and_what_is_conditional_is_not(found) -> None:
    assert {row["name"] for row in found["parameters"]} == SEARCH.keys() - {"optimizer"}


def test_the_same_records_give_the_same(found) -> None:
    assert importance.of(SPACE, make(40)) == found


@pytest.mark.parametrize(
    "records",
    [[], make(9), make(10, value=0.5), [make(1)[0]] * 20, make(12, status="failed"), make(12, replayed_from="x")],
    ids=["none", "few", "equal values", "equal trials", "failed", "replays"],
)
def test_too_little_gives_nothing(records: list[dict[str, Any]]) -> None:
    found = importance.of(SPACE, records)
    assert (found["parameters"], found["best"]) == ([], None)


def test_where_trials_are_stopped_early_they_are_compared_at_equal_epochs() -> None:
    """What was stopped, and has a small value for that alone, counts as what went on; what diverged is the worst."""
    whole = make(40)
    cut = [
        record | {"status": "stopped_early", "value": record["history"][2]["value"], "history": record["history"][:3]}
        for record in whole[:25]
    ]
    found = importance.of(WITH_RUNGS, [*cut, *whole[25:]])
    assert found == importance.of(WITH_RUNGS, whole)
    assert (found["epoch"], found["trials"]) == (3, 40)
    early = [record | {"status": "stopped_early", "history": record["history"][:2]} for record in whole[:5]]
    assert importance.of(WITH_RUNGS, [*early, *whole[5:]])["trials"] == 35
    diverged = [record | {"status": "diverged", "history": []} for record in whole[:5]]
    assert importance.of(WITH_RUNGS, [*diverged, *whole[5:]])["trials"] == 40


def test_points_outside_the_space_are_left_out() -> None:
    records = make(20)
    records[3]["params"] = {"width": 1.0}
    assert importance.of(SPACE, records)["trials"] == 19


def test_it_is_written_and_a_failure_ends_nothing(tmp_path, caplog) -> None:
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make(12)))
    importance.write(tmp_path, SPACE)
    assert json.loads((tmp_path / importance.FILE).read_text()) == importance.of(SPACE, make(12))
    (tmp_path / "records.jsonl").write_text("{")
    importance.write(tmp_path, SPACE)
    assert "the importance of parameters was not written: JSONDecodeError" in caplog.text
    assert [path.name for path in tmp_path.glob("*importance*")] == [importance.FILE]
