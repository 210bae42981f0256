"""The second study: what it asks for, and that it goes on after any stop. Its statistics are in test_race.py."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from tests.tuner.conftest import ended, small_space
from tests.tuner.test_search import ScriptedTask, ray_cluster, run, scripted_space, stop_when_waiting
from tuner import search, selection
from tuner.cluster import Resources
from tuner.repeats import RepeatStudy
from tuner.sampler import SearchStudy
from tuner.space import Repeats, Space
from tuner.tracking import Trackers

__all__ = ["ray_cluster"]


def searched(space: Space, where: Path | None = None, values: tuple[float, ...] = (0.6, 0.61, 0.62, 0.3)) -> list[dict]:
    """The records of a search whose trials came to these values."""
    study = SearchStudy(space, "abc123", where)
    for value in values:
        proposal = study.ask()
        assert proposal is not None
        study.finish(proposal, ended(proposal, value=value))
    return study.records()


def again(study: RepeatStudy, value: float, status: str = "completed") -> str | None:
    """Runs the next repeat; the trial of the search that it repeats."""
    proposal = study.ask()
    if proposal is None:
        return None
    record = study.finish(proposal, ended(proposal, status, value if status == "completed" else None))
    return next(one["repeats"] for one in study.records() if one["trial"] == record["trial"])


def test_repeats_are_of_the_best_with_seeds_of_their_own_until_they_are_spent(space, tmp_path: Path) -> None:
    records = searched(space, tmp_path / "study.journal")
    study = RepeatStudy(space, "abc123", tmp_path / "study.journal", Repeats(trainings=5, seeds=3), records)
    repeated = [again(study, 0.6) for _ in range(6)]
    assert repeated[5] is None
    assert study.is_over()
    assert records[3]["trial"] not in repeated
    assert max(Counter(repeated[:5]).values()) <= 2  # three with the search's own
    found = study.records()
    assert [one["trial"] for one in found] == [f"abc123-r{n:04d}" for n in range(5)]
    by_trial = {record["trial"]: record for record in records}
    for trial in set(repeated[:5]):
        assert trial is not None
        seeds = [one["seed"] for one in found if one["repeats"] == trial]
        assert seeds == [1, 2][: len(seeds)]
        for one in found:
            if one["repeats"] == trial:
                assert one["config"] | {"seed": 0} == by_trial[trial]["config"]
                assert one["params"] == by_trial[trial]["params"]
    # The search's own study is as it was, and lies beside.
    assert SearchStudy(space, "abc123", tmp_path / "study.journal").records() == records
    names = optuna.get_all_study_names(study._storage)
    assert names == [study._study.study_name.removesuffix("-repeats"), study._study.study_name]


def test_as_many_as_half_the_trained_networks_if_nobody_says_how_many(space) -> None:
    assert RepeatStudy(space, "abc123", None, Repeats(), searched(space)).trainings == 2


def test_those_that_run_at_once_are_not_all_of_one_configuration(space) -> None:
    study = RepeatStudy(space, "abc123", None, Repeats(trainings=6, seeds=5), searched(space))
    asked = [study.ask() for _ in range(4)]
    configs = {json.dumps(one.config.to_dict() | {"seed": 0}) for one in asked if one}
    assert len({(one.config.seed, one.config.learning_rate) for one in asked if one}) == 4
    assert len(configs) > 1


def test_one_that_was_interrupted_comes_first_with_its_seed(space, tmp_path: Path) -> None:
    records = searched(space, tmp_path / "study.journal")
    asked = Repeats(trainings=3)
    study = RepeatStudy(space, "abc123", tmp_path / "study.journal", asked, records)
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    study.report(first.number, 1, 0.5)
    study.put_back(second.number)
    # The process is killed here.
    later = RepeatStudy(space, "abc123", tmp_path / "study.journal", asked, records)
    assert [later.ask(new=False), later.ask(new=False)] == [first, second]
    assert later.ask(new=False) is None


def test_repeats_that_were_begun_must_be_where_they_were(space, tmp_path: Path) -> None:
    records = searched(space)
    with pytest.raises(ValueError, match="has begun and is not where it should be; bring its journal back"):
        RepeatStudy(space, "abc123", tmp_path / "study.journal", Repeats(), records, begun=True)


def test_where_all_fell_out_nothing_more_is_asked_for(space) -> None:
    study = RepeatStudy(space, "abc123", None, Repeats(trainings=9), searched(space, values=(0.5, 0.5)))
    assert again(study, 0.0, "diverged")
    assert again(study, 0.0, "diverged") is None  # one is left, and nothing to tell it from
    alone = RepeatStudy(space, "abc123", None, Repeats(trainings=9), searched(space, values=(0.5,)))
    assert alone.is_over()


def test_what_keeps_crashing_is_left_alone_and_what_diverges_is_out(space) -> None:
    records = searched(space, values=(0.3, 0.69, 0.7, 0.2))
    study = RepeatStudy(space, "abc123", None, Repeats(trainings=9), records)
    first = again(study, 0.0, "failed")
    assert first in {record["trial"] for record in records[1:3]}
    others = [again(study, 0.0, "failed") for _ in range(5)]
    assert max(Counter([first, *others]).values()) == 3
    diverges = again(study, 0.0, "diverged")
    known = study.selection()
    assert known is not None
    assert [one.trial for one in known.out] == [diverges]


def test_a_baseline_outside_the_space_is_repeated_as_it_is() -> None:
    space = small_space(train={"width": 0.1, "epochs": 3, "optimizer": "adam"})
    records = searched(space, values=(0.9, 0.89, 0.3))
    assert records[0]["number"] is None
    study = RepeatStudy(space, "abc123", None, Repeats(trainings=2), records)
    repeated = {again(study, 0.9) for _ in range(2)}
    assert records[0]["trial"] in repeated
    one = next(one for one in study.records() if one["repeats"] == records[0]["trial"])
    assert one["config"]["optimizer"] == "sgd"
    assert one["params"] == records[0]["params"]


def test_two_objectives_and_databases_hold_repeats_too(tmp_path: Path) -> None:
    space = small_space(
        search={"num_segmented": {"type": "int", "low": 2, "high": 8}},
        objective=[{"metric": "dice_mean"}, {"metric": "num_segmented"}],
    )
    where = f"sqlite:///{tmp_path}/study.db"
    search = SearchStudy(space, "abc123", where)
    for value in (0.6, 0.61, 0.62):
        proposal = search.ask()
        assert proposal is not None
        search.finish(proposal, ended(proposal, value=value, num_segmented=4))
    study = RepeatStudy(space, "abc123", where, Repeats(trainings=1, prefer="cheapest"), search.records())
    proposal = study.ask()
    assert proposal is not None
    record = study.finish(proposal, ended(proposal, value=0.6, num_segmented=4))
    assert record["values"] == [0.6, 4]
    assert study.is_over()


@pytest.mark.timeout(240)
def test_repeats_run_on_workers_stop_and_go_on(ray_cluster, tmp_path: Path, monkeypatch) -> None:
    """A search by script, then its repeats, stopped in the middle of one."""
    space = scripted_space([1.0, 1.01, 1.02])
    assert run(space, tmp_path) == "finished"
    records = SearchStudy(space, "abc123", tmp_path / "study.journal").records()
    written = (tmp_path / "records.jsonl").read_text()
    asked = Repeats(trainings=4, seeds=3)

    def session() -> str:
        study = RepeatStudy(space, "abc123", tmp_path / "study.journal", asked, records)
        task = ScriptedTask(tmp_path, dict.fromkeys(("1", "1.01", "1.02"), "wait"))
        resources = Resources(concurrent=1)
        return search.run_trials(study, task, tmp_path, study.space.budget, resources, Trackers())

    stop_when_waiting(tmp_path, monkeypatch)
    assert session() == "stopped"
    (tmp_path / "go").touch()
    assert session() == "finished"
    repeats = selection.read(tmp_path)
    assert [one["status"] for one in repeats] == ["completed"] * len(repeats)
    assert 2 <= len(repeats) <= 4  # without any luck in them two separate the best
    assert {one["config"]["delta_cls_loss"] for one in repeats} <= {1.0, 1.01, 1.02}
    assert (tmp_path / "records.jsonl").read_text() == written
    study = RepeatStudy(space, "abc123", tmp_path / "study.journal", asked, records)
    assert study.is_over()
    folders = {path.name for path in (tmp_path / "trials").glob("attempt-*/*") if "-r00" in path.name}
    assert {one["trial"] for one in repeats} <= {name.partition(".")[0] for name in folders}


def test_the_settings_travel_with_a_space() -> None:
    space = small_space(repeats={"trainings": 4, "prefer": "cheapest"})
    assert space.repeats == Repeats(trainings=4, prefer="cheapest")
    assert space.to_dict()["repeats"] == {"trainings": 4, "seeds": 5, "prefer": "cheapest"}
    assert space.fingerprint() == replace(space, repeats=None).fingerprint()
    assert "repeats" not in small_space().to_dict()
    with pytest.raises(ValueError, match=r"repeats.seeds: must be a whole number of at least 2, .* found 1") as wrong:
        small_space(repeats={"seeds": 1, "prefer": "luck", "trainings": 0, "times": 3})
    assert "repeats" in str(wrong.value)
