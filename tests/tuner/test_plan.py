"""The forecast as arithmetic on given times, and a plan of real steps beside a real training."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import synthetic
from tests.tuner.conftest import ended, small_space
from tuner import plan as plans
from tuner.sampler import SearchStudy
from tuner.space import Scheduler, Space
from tuner.timing import Corner, Machine
from tuner.trial import TrialTask

CPU = Machine(name="CPU", on_gpu=False, memory_bytes=8 * 2**30, devices_per_trial=1.0, concurrent=2)
IMAGES = {"epoch": 100, "train": 150, "validation": 20, "test": 30}
SECONDS = {"step_seconds": 0.1, "image_seconds": 0.05, "epoch_seconds": 1.0, "memory_bytes": 2**30, "micro_batch": 0}


def corner(space: Space, *names: str, **more: Any) -> Corner:
    return Corner(names=names, config=space.baseline_config(0), **(SECONDS | more))


def found(machine: Machine = CPU, slower: float = 1.0, **parts: Any) -> dict[str, Any]:
    """The forecast where an epoch takes 12 s, or so many times that."""
    space = small_space(**parts)
    times = {name: SECONDS[name] * slower for name in ("step_seconds", "image_seconds", "epoch_seconds")}
    return plans.forecast(space, IMAGES, [corner(space, "baseline"), corner(space, "largest", **times)], machine)


def epochs(count: int) -> dict[str, Any]:
    return {"train": {"width": 0.1, "epochs": count}}


def test_an_epoch_is_its_steps_its_validation_and_the_rest() -> None:
    [row, _] = found(**epochs(3))["corners"]
    assert row["epoch_seconds"] == pytest.approx(100 * 0.1 + 20 * 0.05 + 1)
    assert row["trial_hours"] == pytest.approx(3 * 12 / 3600)


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 9))
def test_twice_the_epochs_are_twice_the_forecast(count: int, trials: int, concurrent: int) -> None:
    machine = Machine(name="", on_gpu=False, memory_bytes=2**33, devices_per_trial=2.0, concurrent=concurrent)
    once, twice = (found(machine, 1.7, budget={"trials": trials}, **epochs(n))["search"] for n in (count, 2 * count))
    for key in ("wall_hours", "device_hours"):
        assert twice[key] == pytest.approx([2 * hours for hours in once[key]])
        assert once[key][0] <= once[key][1] * (1 + 1e-9)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 4096])
def test_a_last_batch_that_is_not_full_is_a_step(batch_size: int) -> None:
    [row, _] = found(train={"width": 0.1, "epochs": 1, "batch_size": batch_size})["corners"]
    assert row["epoch_seconds"] == pytest.approx(math.ceil(100 / batch_size) * 0.1 + 2)


def test_device_hours_and_money_follow_from_what_a_trial_holds() -> None:
    machine = Machine(name="", on_gpu=True, memory_bytes=2**35, devices_per_trial=0.5, concurrent=2, gpus=1)
    budget = {"trials": 10, "money": 1000, "price_per_device_hour": 3}
    search = found(machine, budget=budget, **epochs(300))["search"]
    assert search["device_hours"] == pytest.approx([5.0, 5.0])  # ten trials of an hour on half a GPU
    assert search["money"] == pytest.approx([15.0, 15.0])
    assert search["wall_hours"] == pytest.approx([5.0, 5.5])


def test_early_stopping_is_the_low_end_of_the_range() -> None:
    """Rungs at 4 and 8 of 12 epochs: 4, then half of 4, then a quarter of 4."""
    assert plans.least_epochs(Scheduler(name="asha", min_epochs=4, reduction=2), 12, 7) == pytest.approx(7.0)
    assert plans.least_epochs(Scheduler(name="none"), 12, 7) == 12
    assert plans.least_epochs(Scheduler(name="median"), 12, 7) == 12
    search = found(scheduler={"name": "asha", "min_epochs": 4, "reduction": 2}, budget={"trials": 7}, **epochs(12))[
        "search"
    ]
    assert search["device_hours"] == pytest.approx([(1 + 6 * 7 / 12) * 0.04, 7 * 0.04])


@given(
    st.sampled_from(("asha", "hyperband")), st.integers(1, 20), st.integers(2, 5), st.integers(1, 99), st.integers(1, 9)
)
def test_no_trial_is_stopped_before_the_first_rung(
    name: str, first: int, reduction: int, count: int, trials: int
) -> None:
    least = plans.least_epochs(Scheduler(name=name, min_epochs=first, reduction=reduction), count, trials)
    assert min(first, count) - 1e-9 <= least <= count + 1e-9


LIMITS = [{"hours": 0.04}, {"device_hours": 0.04}, {"money": 0.12, "price_per_device_hour": 3}]


@pytest.mark.parametrize("budget", LIMITS, ids=lambda budget: next(iter(budget)))
def test_a_budget_that_cannot_hold_the_baseline_is_refused(budget: dict[str, float]) -> None:
    """A trial of 12 epochs takes 0.04 hours."""
    name, limit = next(iter(budget.items()))
    assert found(budget=budget | {name: limit * 1.01}, **epochs(12))["budget"][name]["trials"][0] >= 1
    message = (
        rf"budget\.{name} must hold the baseline, .* takes about {limit:g} here, found {limit * 0.9:.4g}; raise it"
    )
    with pytest.raises(ValueError, match=message):
        found(budget=budget | {name: limit * 0.9}, **epochs(12))


def test_all_limits_that_are_too_low_are_named_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)budget\.hours must.*budget\.device_hours must.*estimates from a few steps"
    ):
        found(budget={"hours": 0.01, "device_hours": 0.01}, **epochs(12))


def test_the_room_that_a_budget_has() -> None:
    """Trials of 0.04 hours, or 0.08 for the dearest, on two slots."""
    room = found(slower=2.0, budget={"trials": 50, "hours": 0.17, "device_hours": 0.17}, **epochs(12))["budget"]
    assert room["hours"] == {"limit": 0.17, "trials": [4, 8]}
    assert room["device_hours"] == {"limit": 0.17, "trials": [2, 4]}
    assert found(budget={"trials": 3, "hours": 9}, **epochs(12))["budget"]["hours"]["trials"] == [3, 3]


@given(st.integers(2**20, 75 * 2**30), st.integers(1, 64), st.integers(1, 8))
def test_the_share_of_a_gpu_holds_a_trial(memory_bytes: int, cores: int, gpus: int) -> None:
    machine = replace(CPU, on_gpu=True, memory_bytes=80 * 2**30, cores=cores, gpus=gpus)
    space = small_space(budget={"trials": 90})
    corners = [corner(space, "baseline", memory_bytes=memory_bytes)]
    memory = plans.forecast(space, IMAGES, corners, machine)["memory"]
    share = memory["gpus_per_trial"]
    assert share == 1.0 or share * machine.memory_bytes >= memory["trial_bytes"] > memory_bytes
    assert memory["fit"] == int(1 / share)
    assert 1 <= memory["fit"] <= max(1, cores // gpus)
    here = plans._sharing(machine, memory["trial_bytes"], None, None, 90)
    assert (here.devices_per_trial, here.concurrent) == (share, gpus * memory["fit"])


def test_the_corners_do_not_depend_on_the_order_of_choices() -> None:
    def costs(flips: list[bool], kinds: list[str]) -> dict[str, tuple[Any, ...]]:
        search = {
            "weighted_loss": {"type": "categorical", "choices": flips},
            "optimizer": {"type": "categorical", "choices": kinds},
            "hard_mining_places": {"type": "int", "low": 0, "high": 4},
            "learning_rate": {"type": "float", "low": 0.1, "high": 1.0},
        }
        return {
            name: (config.weighted_loss, config.optimizer, config.hard_mining_places)
            for names, config in plans.corners_of(small_space(search=search)).items()
            for name in names
        }

    for flips, kinds in itertools.product(([True, False], [False, True]), (["adam", "sgd"], ["sgd", "adam"])):
        assert costs(flips, kinds) == {
            "baseline": (False, "sgd", 0), "smallest": (False, "sgd", 0), "largest": (True, "adam", 4)
        }  # fmt: skip


def test_each_architecture_is_timed_and_what_costs_the_same_once() -> None:
    choices = ["segdecnet", "segdecnet_plusplus"]
    search = {
        "architecture": {"type": "categorical", "choices": choices},
        "weighted_loss": {"type": "categorical", "choices": [True, False], "when": {"architecture": "segdecnet"}},
    }
    corners = plans.corners_of(small_space(search=search))
    assert {names: config.architecture for names, config in corners.items()} == {
        ("baseline",): "segdecnet_decoder",
        ("smallest segdecnet",): "segdecnet",
        ("largest segdecnet",): "segdecnet",
        ("smallest segdecnet_plusplus", "largest segdecnet_plusplus"): "segdecnet_plusplus",
    }
    assert list(plans.corners_of(small_space())) == [("baseline", "smallest", "largest")]


def test_a_grid_and_nothing_at_all_end_by_themselves() -> None:
    search = {"dilate": {"type": "int", "low": 1, "high": 5, "step": 2}}
    grid = small_space(search=search, sampler="grid", budget={"trials": 99})
    assert plans.trials_of(grid) == 3 + (grid.baseline_params() is None)
    assert plans.trials_of(small_space(search={}, budget={"hours": 1})) in (1, 2)
    assert plans.trials_of(small_space(budget={"hours": 1})) is None


def test_a_grid_trains_as_many_networks_as_differ_in_training() -> None:
    """Against a study that is asked until nothing is new, with records that replay what the space may propose."""
    rules = {"type": "categorical", "choices": ["min_of_max", "pr_curve", "grid"]}
    dilate = {"type": "int", "low": 1, "high": 5, "step": 2}
    factor = {"type": "int", "low": 1, "high": 30, "when": {"threshold_rule": "pr_curve"}}
    for search, train in (
        ({"threshold_rule": rules}, {"learning_rate": 1.0}),
        ({"threshold_rule": rules}, {"learning_rate": 0.1}),
        ({"threshold_rule": rules, "dilate": dilate}, {"blacken": True}),
        ({"threshold_rule": rules, "threshold_factor": factor}, {}),  # more factors than are replayed
    ):
        space = small_space(
            search=search, sampler="grid", budget={"hours": 1}, train={"width": 0.1, "epochs": 3, **train}
        )
        study, task = (
            SearchStudy(space, "abc123", None),
            TrialTask([], [], "dice_mean", "objective", space.replayed_values()),
        )
        trained = 0
        while proposal := study.ask():
            ways = [way._asdict() for way in task.judgements(proposal.config)]
            replays = [way | {"value": 0.5, "epoch": 1, "thresholds": None} for way in ways]
            study.finish(proposal, ended(proposal, replays=replays))
            trained += 1
        assert plans.trials_of(space) == trained


def test_every_forecast_can_be_shown() -> None:
    gpu = Machine(name="GPU", on_gpu=True, memory_bytes=2**36, devices_per_trial=0.25, concurrent=4, gpus=1)
    budget = {"hours": 500, "device_hours": 400, "money": 900, "price_per_device_hour": 2}
    for one in (found(), found(gpu, 3.0, budget={"trials": 90} | budget, **epochs(50)), found(budget=budget)):
        shown = plans.show(json.loads(json.dumps(one)))
        assert all(len(line) <= 100 for line in shown.splitlines())
        assert "Estimates from a few steps" in shown
    search = {
        "optimizer": {"type": "categorical", "choices": ["adam"]},
        "weighted_loss": {"type": "categorical", "choices": [True]},
        "weight_per": {"type": "categorical", "choices": ["component"]},
        "hard_mining_places": {"type": "int", "low": 3, "high": 4},
        "hard_mining_score": {"type": "categorical", "choices": ["errors"]},
        "augment_flips": {"type": "categorical", "choices": [True]},
        "augment_brightness": {"type": "float", "low": 0.1, "high": 0.4},
    }
    space = small_space(search=search)
    corners = [Corner(names=names, config=config, **SECONDS) for names, config in plans.corners_of(space).items()]
    shown = plans.show(plans.forecast(space, IMAGES, corners, CPU))
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert "  optimizer adam, weighted_loss true, weight_per component, hard_mining_places 4" in shown
    assert "num_segmented" not in shown
    assert "4 at once: " in plans.show(found(gpu, budget={"trials": 90}))
    assert "TOO FEW" in plans.show(
        found(Machine(name="", on_gpu=False, memory_bytes=2**30, devices_per_trial=1, concurrent=2))
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "set"
    synthetic.write(folder, count=48, height=64, width=128)
    return folder


def test_a_plan_leaves_nothing_behind(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    one = plans.plan(small_space(), data, concurrent=2)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert one["images"]["train"] + one["images"]["validation"] + one["images"]["test"] == 48
    assert one["corners"][0]["step_seconds"] > 0
    assert one["memory"]["trial_bytes"] > 2**20


def test_a_plan_checks_what_a_run_checks(data: Path, crackforest: Path) -> None:
    with pytest.raises(ValueError, match="num_segmented must be at most"):
        plans.plan(small_space(train={"num_segmented": 500}), data)
    with pytest.raises(ValueError, match="objective decision_ap needs images without a defect, found none"):
        plans.plan(small_space(objective={"metric": "decision_ap"}), crackforest)
    with pytest.raises(ValueError, match="there is no such file"):
        plans.plan("nothing.yaml", data)


def test_a_plan_counts_folds() -> None:
    plain = found(**epochs(3))
    counted = IMAGES | {"outer": 10, "trainings": 5}
    space = small_space(
        **epochs(3), cross_validation={"folds": 5, "nested": True}, scheduler={"name": "asha", "reduction": 2}
    )
    folded = plans.forecast(space, counted, [corner(space, "baseline"), corner(space, "largest")], CPU)
    once = plain["corners"][0]["trial_hours"] + 10 * SECONDS["image_seconds"] / 3600
    assert folded["corners"][0]["trial_hours"] == pytest.approx(5 * once)
    assert folded["least_share_of_epochs"] == pytest.approx((1 + 1 / 2 + 2 * 1 / 4 + 1 / 8) / 5)  # rungs 1, 2, 4
    assert folded["cache_bytes"] == (150 + 20 + 10 + 30) * 4 * 64 * 128
    assert "3 epochs a fold, 5 folds a trial" in " ".join(plans.show(folded).split())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_plan_of_folds_times_one_of_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    synthetic.write(tmp_path / "set", count=32, height=64, width=128)
    one = plans.plan(small_space(), tmp_path / "set", cpus_per_trial=1)
    five = plans.plan(small_space(cross_validation={"folds": 5}), tmp_path / "set", cpus_per_trial=1)
    pool = one["images"]["train"] + one["images"]["validation"]
    assert five["images"]["trainings"] == 5
    assert five["images"]["validation"] == pytest.approx(pool / 5, abs=1)
    assert five["images"]["train"] + five["images"]["validation"] == pytest.approx(pool, abs=1)
    assert five["images"]["test"] == one["images"]["test"]
