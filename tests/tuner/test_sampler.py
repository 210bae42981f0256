"""The study at its border: a real Optuna journal, and a real database, opened again as after a kill."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.tuner.conftest import ended, small_space
from tuner import records
from tuner.sampler import MAX_REPLAYS_IN_A_ROW, Proposal, SearchStudy, count_running
from tuner.space import Space


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.fixture(params=["journal", "sqlite"])
def where(request, tmp_path: Path) -> Path | str:
    return tmp_path / "study.journal" if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


def states(where: Path | str) -> list[TrialState]:
    """As any other program of Optuna's sees them."""
    storage = where if isinstance(where, str) else JournalStorage(JournalFileBackend(str(where)))
    (name,) = optuna.get_all_study_names(storage)
    return [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]


def test_the_baseline_comes_first_and_once(space: Space, journal: Path) -> None:
    study = SearchStudy(space, "abc123", journal)
    first, second = study.ask(), study.ask()
    assert first.is_baseline
    assert first.params == {"learning_rate": 1.0, "threshold_rule": "pr_curve"}
    assert (first.trial, second.trial) == ("abc123-0000", "abc123-0001")
    assert not second.is_baseline
    assert space.contains(second.params)


def test_a_baseline_outside_the_space_is_a_record_and_no_point(where: Path | str) -> None:
    space = small_space(train={"width": 0.1, "epochs": 3, "optimizer": "adam"})
    study = SearchStudy(space, "abc123", where)
    baseline, first = study.ask(), study.ask()
    assert (baseline.trial, baseline.number, baseline.is_baseline) == ("abc123-baseline", None, True)
    assert baseline.config.optimizer == "sgd"
    assert baseline.params == {"optimizer": "sgd"}
    assert first.number == 0
    assert not first.is_baseline
    study.report(None, 1, 0.3)
    study.finish(baseline, ended(baseline))
    assert [record["trial"] for record in study.records()] == ["abc123-baseline"]
    again = SearchStudy(space, "abc123", where)
    assert again.ask().number == 0
    assert [record["trial"] for record in again.records()] == ["abc123-baseline"]


def test_without_a_journal_the_study_is_in_memory(space: Space, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = SearchStudy(space, "abc123", None)
    baseline, first = study.ask(), study.ask()
    study.report(first.number, 1, 0.25)
    study.finish(baseline, ended(baseline))
    study.put_back(first.number)
    assert study.ask() == first
    assert study.curves() == {first.number: {1: 0.25}}
    study.finish(first, ended(first, "stopped_early"))
    assert [record["status"] for record in study.records()] == ["completed", "stopped_early"]
    assert SearchStudy(space, "abc123", None).records() == []
    assert list(tmp_path.iterdir()) == []


def test_start_from_follows_the_baseline(where: Path | str) -> None:
    point = {"learning_rate": 0.25, "threshold_rule": "grid"}
    study = SearchStudy(small_space(start_from=[point]), "abc123", where)
    assert [study.ask().params for _ in range(2)] == [{"learning_rate": 1.0, "threshold_rule": "pr_curve"}, point]


def test_every_end_has_its_state(space: Space, where: Path | str) -> None:
    study = SearchStudy(space, "abc123", where)
    statuses = ["completed", "stopped_early", "diverged", "failed"]
    for status in statuses:
        proposal = study.ask()
        study.report(proposal.number, 1, 0.25)
        study.report(proposal.number, 1, 0.25)  # told twice after a resume
        study.finish(proposal, ended(proposal, status))
    assert states(where) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    trials = SearchStudy(space, "abc123", where)._study.trials
    assert trials[0].value == 0.5
    assert [trial.intermediate_values for trial in trials] == [{1: 0.25}] * 4
    assert [trial.user_attrs["record"]["reason"] for trial in trials] == [None, "because", "because", "because"]


def test_what_was_running_is_asked_for_again_with_its_name(space: Space, where: Path | str) -> None:
    study = SearchStudy(space, "abc123", where)
    finished, killed, stopped = (study.ask() for _ in range(3))
    study.finish(finished, ended(finished))
    study.report(killed.number, 1, 0.3)
    study.put_back(stopped.number)
    assert count_running(where) == 1

    again = SearchStudy(space, "abc123", where)
    assert count_running(where) == 0
    assert [again.ask() for _ in range(2)] == [killed, stopped]
    assert again.curves() == {killed.number: {1: 0.3}}
    new = again.ask()
    assert new.number == 3
    assert new.params not in (finished.params, killed.params, stopped.params)


def test_a_torn_last_line_is_mended(space: Space, journal: Path) -> None:
    study = SearchStudy(space, "abc123", journal)
    finished = study.ask()
    study.finish(finished, ended(finished))
    whole = journal.read_bytes()
    study.ask()
    torn = journal.read_bytes()
    for cut in range(len(whole), len(torn), max(1, (len(torn) - len(whole)) // 25)):
        journal.write_bytes(torn[:cut])
        again = SearchStudy(space, "abc123", journal)
        assert [record["trial"] for record in again.records()] == [finished.trial]
        proposal = again.ask()
        again.finish(proposal, ended(proposal))
        assert len(SearchStudy(space, "abc123", journal).records()) == 2


def test_a_trained_network_answers_other_threshold_rules(where: Path | str) -> None:
    space = small_space(
        search={"threshold_rule": {"type": "categorical", "choices": ["min_of_max", "pr_curve", "grid"]}},
        train={"width": 0.1, "epochs": 3, "learning_rate": 1.0},
        sampler="random",
    )
    study = SearchStudy(space, "abc123", where)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, value=0.4))
    assert study.ask() is None  # every proposal is a replay: the space is exhausted
    records = study.records()
    assert len(records) == 1 + MAX_REPLAYS_IN_A_ROW
    by_rule = {"min_of_max": 0.1, "pr_curve": 0.4, "grid": 0.5}
    assert study.ask() is None
    again = SearchStudy(space, "abc123", where)
    assert again.ask() is None
    assert len(again.records()) == len(records)  # asking again, and resuming, adds nothing
    for record in records[1:]:
        assert record["replayed_from"] == baseline.trial
        assert record["value"] == by_rule[record["params"]["threshold_rule"]]
        assert record["best_epoch"] == (1 if record["params"]["threshold_rule"] == "grid" else 2)
        assert record["seconds"] == record["device_seconds"] == 0
        assert record["config"]["threshold_rule"] == record["params"]["threshold_rule"]
    assert set(states(where)) == {TrialState.COMPLETE}


def one_network() -> Space:
    """All of whose points train the same network, the baseline's."""
    search = {
        "learning_rate": {"type": "categorical", "choices": [1.0]},
        "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
    }
    return small_space(search=search, sampler="random")


def test_what_diverged_diverges_under_every_rule(where: Path | str) -> None:
    study = SearchStudy(one_network(), "abc123", where)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, "diverged", value=None, replays=[]))
    assert study.ask() is None
    assert set(states(where)) == {TrialState.FAIL}
    for record in study.records()[1:]:
        assert (record["status"], record["value"], record["replayed_from"]) == ("diverged", None, baseline.trial)


def test_what_crashed_is_tried_again(journal: Path) -> None:
    study = SearchStudy(one_network(), "abc123", journal)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, "failed", value=None, replays=[]))
    assert study.ask() is not None


def test_a_trial_that_was_stopped_answers_for_itself_alone(where: Path | str) -> None:
    """At its rung it was compared under its own rule; under another it might have gone on, and is trained."""
    study = SearchStudy(one_network(), "abc123", where)
    baseline = study.ask()
    history = [{"epoch": epoch, "value": 0.4, "compared": epoch / 10} for epoch in (1, 2)]
    study.finish(baseline, ended(baseline, "stopped_early", value=0.4, history=history))
    again = study.ask()
    assert again.params["threshold_rule"] == "grid"
    for record in study.records()[1:]:
        assert (record["status"], record["params"]["threshold_rule"]) == ("stopped_early", "pr_curve")
        assert study._study.trials[record["number"]].intermediate_values == {1: 0.1, 2: 0.2}
    assert study.curves() == {}  # a replay reached no rung of its own


def test_conditional_parameters_are_asked_only_where_they_hold(where: Path | str) -> None:
    search = {
        "threshold_factor": {"type": "int", "low": 1, "high": 9, "when": {"threshold_rule": "pr_curve"}},
        "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
        "learning_rate": {"type": "float", "low": 0.01, "high": 1.0},
    }
    space = small_space(search=search, budget={"trials": 30})
    study = SearchStudy(space, "abc123", where)
    seen = set()
    for n in range(30):
        proposal = study.ask()
        assert space.contains(proposal.params)
        seen.add("threshold_factor" in proposal.params)
        study.finish(proposal, ended(proposal, value=n / 100, replays=[]))
    assert seen == {True, False}


def test_bounds_and_steps_reach_optuna_as_they_are(journal: Path) -> None:
    space = small_space(
        search={"dilate": {"type": "int", "low": 1, "high": 5, "step": 2}}, sampler="random", budget={"trials": 40}
    )
    study = SearchStudy(space, "abc123", journal)
    drawn = set()
    for _ in range(40):
        proposal = study.ask()
        drawn.add(proposal.params["dilate"])
        study.finish(proposal, ended(proposal, replays=[]))
    assert drawn == {1, 3, 5}


def test_two_spaces_are_two_studies(space: Space, where: Path | str) -> None:
    SearchStudy(space, "abc123", where).ask()
    other = small_space(train={"width": 0.1, "epochs": 4})
    assert SearchStudy(other, "abc123", where).ask().number == 0


def test_the_clock_runs_over_all_sessions(space: Space, where: Path | str) -> None:
    SearchStudy(space, "abc123", where).add_seconds(10, 30)
    study = SearchStudy(space, "abc123", where)
    study.add_seconds(5, 20)
    assert (study.wall_seconds(), study.device_seconds()) == (15, 50)


def test_a_network_that_is_being_trained_is_waited_for(where: Path | str) -> None:
    space = small_space(
        search={"threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]}},
        train={"width": 0.1, "epochs": 3, "learning_rate": 1.0},
        budget={"trials": 5},
    )
    study = SearchStudy(space, "abc123", where)
    baseline = study.ask()
    assert study.ask() is None
    assert study.ask() is None
    assert count_running(where) == 1
    study.finish(baseline, ended(baseline))
    assert study.ask() is None
    assert {record["replayed_from"] for record in study.records()} == {None, baseline.trial}


def test_a_warm_start_is_known_to_the_sampler_and_is_nobodys_trial(where: Path | str, tmp_path: Path) -> None:
    wide = {"learning_rate": {"type": "float", "low": 0.01, "high": 2.0, "log": True}}
    narrow = {"learning_rate": {"type": "float", "low": 0.5, "high": 2.0, "log": True}}
    old = SearchStudy(small_space(search=wide), "old000", tmp_path / "old.journal")
    for n in range(8):
        proposal = old.ask()
        end = ("failed", None) if n == 7 else ("completed", n / 10)
        old.finish(proposal, ended(proposal, end[0], value=end[1], replays=[]))
    inside = sum(r["params"]["learning_rate"] >= 0.5 for r in old.records()[:7])
    assert 0 < inside < 7

    study = SearchStudy(small_space(search=narrow), "abc123", where)
    assert study.warm_start(old.records()) == (inside, 7 - inside)
    again = SearchStudy(small_space(search=narrow), "abc123", where)
    assert again.warm_start(old.records()) == (inside, 7 - inside)  # once
    assert len(again._study.get_trials(states=(TrialState.COMPLETE,))) == inside
    assert again.records() == []
    assert again.curves() == {}
    first = again.ask()
    assert (first.is_baseline, first.number) == (True, 0)
    again.finish(first, ended(first))
    assert [record["trial"] for record in again.records()] == ["abc123-0000"]
    assert again.ask().number == inside + 1


SECONDS = {"objective": [{"metric": "dice_mean"}, {"metric": "device_seconds"}]}
MASKS = {"objective": [{"metric": "dice_mean"}, {"metric": "num_segmented"}]}
MINUTES = {
    "objective": [{"metric": "dice_mean"}, {"metric": "labelling_minutes"}],
    "labelling": {"minutes_per_label": 0.05, "minutes_per_mask": 2.0},
}
RECALL = {"constraints": [{"metric": "recall", "min": 0.5}]}
RULES = {
    "learning_rate": {"type": "categorical", "choices": [1.0]},
    "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
}
COUNTED = {"num_segmented": {"type": "categorical", "choices": [5, 10, "all"]}}


def replays(proposal: Proposal, **recalls: float | None) -> list[dict[str, Any]]:
    """What a network gave when it was judged by each rule: the value is half the recall."""
    own = proposal.config.judgement()
    return [
        own._replace(threshold_rule=rule)._asdict()
        | {"value": (recall or 0.0) / 2, "epoch": 1, "thresholds": {}, "figures": {"recall": recall}}
        for rule, recall in recalls.items()
    ]


def test_a_replay_has_both_values_and_its_own_violations(journal: Path) -> None:
    study = SearchStudy(small_space(search=RULES, sampler="random", **SECONDS, **RECALL), "abc123", journal)
    baseline = study.ask()
    judged = replays(baseline, pr_curve=0.8, grid=0.25)
    study.finish(baseline, ended(baseline, value=0.4, device_seconds=7.5, replays=judged))
    assert study.ask() is None
    found = study.records()
    assert {record["params"]["threshold_rule"] for record in found[1:]} == {"pr_curve", "grid"}
    trials = study._study.trials
    for record in found:
        rule = record["params"]["threshold_rule"]
        assert record["values"] == {"pr_curve": [0.4, 7.5], "grid": [0.125, 7.5]}[rule]
        assert record["value"] == record["values"][0]
        assert record["violations"] == {"recall": {"pr_curve": 0.0, "grid": 0.25}[rule]}
        trial = trials[record["number"]]
        assert trial.values == record["values"]
        assert trial.constraints == {"recall": {"pr_curve": pytest.approx(-0.3), "grid": 0.25}[rule]}
    assert found[1]["device_seconds"] == 0  # it cost nothing itself
    assert records.pareto_front(found, ["max", "min"]) == [r for r in found if r["value"] == 0.4]


def test_what_was_stopped_keeps_its_epochs_where_there_are_two_objectives(journal: Path) -> None:
    study = SearchStudy(small_space(search=COUNTED, **MASKS), "abc123", journal)
    stopped = study.ask()
    for epoch in (1, 2):
        study.report(stopped.number, epoch, epoch / 10)
    study.finish(stopped, ended(stopped, "stopped_early", value=0.2, num_segmented=17))
    [trial] = SearchStudy(small_space(search=COUNTED, **MASKS), "abc123", journal)._study.trials
    assert (trial.state, trial.values, trial.intermediate_values) == (TrialState.PRUNED, None, {1: 0.1, 2: 0.2})
    assert trial.user_attrs["record"]["values"] == [0.2, 17]


def test_masks_are_counted_as_the_worker_counted_them(journal: Path) -> None:
    study = SearchStudy(small_space(search=COUNTED, sampler="grid", **MASKS), "abc123", journal)
    for _ in range(3):
        proposal = study.ask()
        kept = proposal.config.num_segmented
        study.finish(proposal, ended(proposal, num_segmented=31 if kept == "all" else kept))
    found = study.records()
    costs = {record["config"]["num_segmented"]: record["values"] for record in found}
    assert costs == {5: [0.5, 5], 10: [0.5, 10], "all": [0.5, 31]}


def test_minutes_follow_from_what_the_worker_counted(journal: Path) -> None:
    study = SearchStudy(small_space(search=COUNTED, sampler="grid", **MINUTES), "abc123", journal)
    for _ in range(3):
        proposal = study.ask()
        kept = proposal.config.num_segmented
        counted = {"num_segmented": 31 if kept == "all" else kept, "labelled": 40}
        study.finish(proposal, ended(proposal, **counted))
    found = study.records()
    costs = {record["config"]["num_segmented"]: record["values"] for record in found}
    assert costs == {5: [0.5, 12.0], 10: [0.5, 22.0], "all": [0.5, 64.0]}
    assert records.front(found, ["max", "min"])[0]["values"] == [0.5, 12.0]
    lacks = [{k: v for k, v in record.items() if k != "labelled"} for record in found]  # of a run without prices
    told = SearchStudy(small_space(search=COUNTED, **MINUTES), "def456", journal.with_name("other.journal"))
    assert told.warm_start(lacks) == (0, 3)


@pytest.mark.parametrize("goals", ["masks", "minutes"])
def test_a_scheduler_compares_trials_with_as_many_masks(journal: Path, goals: str) -> None:
    search = COUNTED | {"dilate": {"type": "int", "low": 1, "high": 9, "step": 2}}
    points = [{"num_segmented": kept, "dilate": dilate} for kept, dilate in ((5, 3), (10, 3), (5, 5), ("all", 3))]
    space = small_space(
        search=search, start_from=points, scheduler="asha", **{"masks": MASKS, "minutes": MINUTES}[goals]
    )
    study = SearchStudy(space, "abc123", journal)
    assert study.ask().is_baseline
    few, more, few_again, every = (study.ask() for _ in points)
    for proposal, compared in ((few, 0.3), (more, 0.6), (few_again, 0.2), (every, 0.1)):
        study.report(proposal.number, 1, compared)
    assert set(study.curves()) == {1, 2, 3, 4}
    assert set(study.curves(few.number)) == {few.number, few_again.number}
    assert set(study.curves(every.number)) == {every.number}

    for proposal in (few, more, few_again, every):
        assert study.leaves(proposal, 1)  # of one or two, nobody is a third
        study.hold(proposal, ended(proposal, "stopped_early"))
    # Each group lets its best go on, though all in another are better; those with equal masks have one place.
    assert {study.ask(new=False).number for _ in range(3)} == {few.number, more.number, every.number}
    assert study.ask(new=False) is None


def test_with_one_objective_a_scheduler_compares_all(journal: Path) -> None:
    search = COUNTED | {"learning_rate": {"type": "float", "low": 0.1, "high": 2.0}}
    study = SearchStudy(small_space(search=search), "abc123", journal)
    proposals = [study.ask() for _ in range(3)]
    assert len({proposal.config.num_segmented for proposal in proposals}) > 1
    for proposal in proposals:
        study.report(proposal.number, 1, 0.5)
    assert set(study.curves(2)) == {1, 2}


def test_the_best_of_a_constrained_study_is_feasible(journal: Path) -> None:
    search = {"dilate": {"type": "int", "low": 1, "high": 9, "step": 2}}
    study = SearchStudy(small_space(search=search, sampler="grid", **RECALL), "abc123", journal)
    for value, recall in ((0.9, 0.4), (0.6, 0.5), (0.5, 0.9), (1.0, None)):
        proposal = study.ask()
        study.finish(proposal, ended(proposal, value=value, replays=replays(proposal, pr_curve=recall)))
        if recall == 0.4:
            assert proposal.is_baseline  # which is never refused as the baseline
            assert records.best(study.records()) is None
            with pytest.raises(ValueError, match="No feasible trials"):
                _ = study._study.best_trial
    assert study._study.best_trial.value == records.best(study.records())["value"] == 0.6
    assert [record["violations"]["recall"] for record in study.records()] == [pytest.approx(0.1), 0, 0, 1]
    again = SearchStudy(small_space(search=search, sampler="grid", **RECALL), "abc123", journal)
    assert again._study.best_trial.number == study._study.best_trial.number


def test_what_has_no_epoch_to_judge_violates_nothing_that_is_known(journal: Path) -> None:
    study = SearchStudy(small_space(**RECALL), "abc123", journal)
    for status, value in (("diverged", 0.4), ("failed", None), ("stopped_early", None)):
        proposal = study.ask()
        study.finish(proposal, ended(proposal, status, value=value, replays=[]))
    assert [record["violations"] for record in study.records()] == [None] * 3
    assert [trial.constraints for trial in study._study.trials] == [{}] * 3


def test_a_kill_between_constraint_and_end_lets_the_next_session_decide(journal: Path, monkeypatch) -> None:
    space = small_space(**RECALL)
    study = SearchStudy(space, "abc123", journal)
    proposal = study.ask()
    monkeypatch.setattr(study._study, "tell", lambda *_, **__: None)  # killed here
    study.finish(proposal, ended(proposal, replays=replays(proposal, pr_curve=0.25)))
    again = SearchStudy(space, "abc123", journal)
    assert again.ask() == proposal
    again.finish(proposal, ended(proposal, replays=replays(proposal, pr_curve=0.75)))
    assert again._study.trials[0].constraints == {"recall": -0.25}


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sampler_keeps_to_the_constraints(sampler: str, journal: Path) -> None:
    """The value grows with the parameter, the recall falls: without the constraint a model goes to the upper end."""
    search = {"delta_cls_loss": {"type": "float", "low": 0.001, "high": 1.0}}
    drawn: dict[str, list[float]] = {}
    for name, more in (("free", {}), ("bounded", RECALL)):
        study = SearchStudy(
            small_space(search=search, sampler=sampler, name=name, **more), "abc123", journal.parent / name
        )
        for _ in range(30):
            proposal = study.ask()
            delta = proposal.config.delta_cls_loss
            judged = replays(proposal, pr_curve=1 - delta)
            study.finish(proposal, ended(proposal, value=delta, replays=judged))
        drawn[name] = [record["config"]["delta_cls_loss"] for record in study.records()[-10:]]
    means = {name: sum(values) / len(values) for name, values in drawn.items()}
    assert means["free"] > 0.75
    assert 0.4 < means["bounded"] < 0.6


def test_a_warm_start_with_two_objectives_needs_what_a_training_cost(journal: Path, tmp_path: Path) -> None:
    search = COUNTED | {"dilate": {"type": "int", "low": 1, "high": 99, "step": 2}}
    old = SearchStudy(small_space(search=search), "old000", tmp_path / "old.journal")  # one objective
    for n in range(12):
        proposal = old.ask()
        old.finish(proposal, ended(proposal, value=n / 20, device_seconds=float(n), replays=[]))
    found = old.records()
    counted = sum(record["config"]["num_segmented"] != "all" for record in found)
    assert 0 < counted < 12

    masks = SearchStudy(small_space(search=search, **MASKS), "abc123", journal)
    assert masks.warm_start(found) == (counted, 12 - counted)  # "all" of the other data may be another number
    known = masks._study.get_trials(states=(TrialState.COMPLETE,))
    assert {trial.values[1] for trial in known} == {5.0, 10.0}
    assert masks.ask().is_baseline
    told = SearchStudy(small_space(search=search, name="told", **MASKS), "abc123", tmp_path / "told.journal")
    assert told.warm_start([record | {"num_segmented": 31} for record in found]) == (12, 0)

    seconds = SearchStudy(small_space(search=search, **SECONDS), "abc123", tmp_path / "seconds.journal")
    replay = found[3] | {"trial": "r", "replayed_from": found[3]["trial"], "device_seconds": 0.0, "value": 0.9}
    orphan = replay | {"replayed_from": "gone"}
    assert seconds.warm_start([*found, replay, orphan]) == (13, 1)
    known = seconds._study.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.values for trial in known[-2:]] == [[11 / 20, 11.0], [0.9, 3.0]]

    single = SearchStudy(small_space(search=search), "abc123", tmp_path / "single.journal")
    proposal = seconds.ask()
    seconds.finish(proposal, ended(proposal, value=0.25))
    assert single.warm_start(seconds.records()) == (1, 0)  # back to one objective
    assert single._study.get_trials(states=(TrialState.COMPLETE,))[0].values == [0.25]


def test_a_warm_start_with_constraints_needs_their_figures(journal: Path, tmp_path: Path) -> None:
    search = {"dilate": {"type": "int", "low": 1, "high": 9, "step": 2}}
    old = SearchStudy(small_space(search=search, sampler="grid"), "old000", tmp_path / "old.journal")
    rows = [
        [{"epoch": 1, "recall": 0.75}],
        [{"epoch": 1, "recall": 0.25}],
        [{"epoch": 1}],
        [{"epoch": 1, "recall": None}],
    ]
    for history in rows:
        proposal = old.ask()
        old.finish(proposal, ended(proposal, history=history))
    study = SearchStudy(small_space(search=search, **RECALL), "abc123", journal)
    found = old.records()
    replay = found[0] | {"trial": "r", "replayed_from": found[0]["trial"], "replays": []}  # its history is the other's
    assert study.warm_start([*found, replay]) == (3, 2)
    known = study._study.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.constraints for trial in known] == [{"recall": -0.25}, {"recall": 0.25}, {"recall": 1.0}]


def test_the_first_start_of_a_trial_is_kept_over_all_sessions(where: Path | str) -> None:
    space = small_space(train={"width": 0.1, "epochs": 3, "optimizer": "adam"})  # its baseline is no trial
    study = SearchStudy(space, "abc123", where)
    baseline, trial = study.ask(), study.ask()
    assert (study.first_started(baseline.number, 1.5), study.first_started(trial.number, 2.5)) == (1.5, 2.5)
    again = SearchStudy(space, "abc123", where)
    assert [again.ask() for _ in range(2)] == [baseline, trial]
    assert (again.first_started(baseline.number, 8.0), again.first_started(trial.number, 9.0)) == (1.5, 2.5)
    assert again.first_started(again.ask().number, 9.5) == 9.5


HOLDING = {"scheduler": {"name": "asha", "min_epochs": 1, "reduction": 2}, "train": {"width": 0.1, "epochs": 4}}


def hold_next(study: SearchStudy, compared: float) -> Proposal:
    """The next trial, held after its first epoch."""
    proposal = study.ask()
    study.report(proposal.number, 1, compared)
    assert study.leaves(proposal, 1) == "not among the best at epoch 1"
    study.hold(proposal, ended(proposal, "stopped_early", value=compared, ended=compared, epochs=1))
    return proposal


def test_a_held_trial_outlives_a_kill_and_a_stop_and_goes_on(where: Path | str) -> None:
    space = small_space(**HOLDING)
    study = SearchStudy(space, "abc123", where)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, ended=0.5))
    first = hold_next(study, 0.3)
    assert states(where)[1] is TrialState.RUNNING
    assert count_running(where) == 0
    study.let_go(for_good=False)  # a stop
    assert states(where)[1] is TrialState.WAITING

    study = SearchStudy(space, "abc123", where)
    second = hold_next(study, 0.2)  # a new one: of a single one, nobody is a half
    study = SearchStudy(space, "abc123", where)  # a kill
    assert [record["trial"] for record in study.records()] == [p.trial for p in (baseline, first, second)]
    goes_on = study.ask()
    assert goes_on == first
    assert [record["trial"] for record in study.records()] == [p.trial for p in (baseline, second)]
    study = SearchStudy(space, "abc123", where)  # a kill while it runs: now it is an interrupted trial
    assert study.ask() == first
    study.report(first.number, 2, 0.4)
    assert study.leaves(first, 2) == "not among the best at epoch 2"  # the rung at epoch 1 is behind it
    study.hold(first, ended(first, "stopped_early", value=0.4, ended=2.0, epochs=2))
    assert study.ask(new=False) == first  # no more will come, and it is the best at epoch 2
    study.finish(first, ended(first, value=0.6, ended=3.0, epochs=4))
    assert study.ask(new=False) is None
    assert [record["trial"] for record in study.let_go(for_good=True)] == [second.trial]
    assert states(where) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert [record["value"] for record in study.records()] == [0.5, 0.6, 0.2]


def test_a_trial_that_went_on_answers_with_its_end(where: Path | str) -> None:
    space = small_space(**HOLDING, search={"threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]}})
    study = SearchStudy(space, "abc123", where)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, "failed", value=None, replays=[], ended=0.5))
    held = hold_next(study, 0.3)
    assert study.ask(new=False) == held
    study.finish(held, ended(held, ended=3.0))
    assert study.ask() is None
    replays = [record for record in study.records() if record["replayed_from"]]
    assert {record["replayed_from"] for record in replays} == {held.trial}
    assert {record["status"] for record in replays} == {"completed"}


def test_a_sampler_is_shown_what_unfinished_trials_have_reached(journal: Path) -> None:
    """Whoever is best at the rungs lies low: TPE follows, though the only completed trial lies high."""
    search = {"delta_cls_loss": {"type": "float", "low": 0.001, "high": 1.0}}
    space = small_space(**HOLDING | {"scheduler": "top_k"}, search=search, budget={"trials": 60}, start_from=[])
    study = SearchStudy(space, "abc123", journal)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, value=0.0, ended=0.0))
    drawn = []
    for _ in range(40):
        proposal = study.ask()
        drawn.append(proposal.config.delta_cls_loss)
        reached = 1 - abs(proposal.config.delta_cls_loss - 0.8)
        study.report(proposal.number, 1, reached)
        assert study.leaves(proposal, 1)
        study.hold(proposal, ended(proposal, "stopped_early", value=reached, ended=1.0))
    assert sum(drawn[-10:]) / 10 == pytest.approx(0.8, abs=0.1)
    assert {trial.state for trial in study._study.trials[1:]} == {TrialState.RUNNING}


def test_a_grid_trains_every_network_and_judges_it_in_every_way(journal: Path) -> None:
    """However many of its points are known in a row."""
    search = RULES | {"dilate": {"type": "int", "low": 1, "high": 5, "step": 2}}
    search["threshold_rule"] = {"type": "categorical", "choices": ["pr_curve", "grid", "min_of_max"]}
    search["best_by"] = {"type": "categorical", "choices": ["objective", "decision", "segmentation", "both"]}
    search["lower_threshold"] = {"type": "float", "low": 0.2, "high": 1.0, "step": 0.2}
    space = small_space(search=search, sampler="grid")
    study = SearchStudy(space, "abc123", journal)
    trained = 0
    ways = [judgement._asdict() | {"value": 0.5, "epoch": 1, "thresholds": {}} for judgement in judgements(space)]
    while (proposal := study.ask()) is not None:
        study.finish(proposal, ended(proposal, replays=ways))
        trained += 1
    assert trained == 3
    assert len(study.records()) == len(space.grid()) == 3 * 3 * 4 * 5


def judgements(space: Space) -> set[Any]:
    return {space.config(point, 0).judgement() for point in space.grid()}


def test_a_grid_trains_what_another_run_had(journal: Path, tmp_path: Path) -> None:
    space = small_space(search={"dilate": {"type": "int", "low": 1, "high": 5, "step": 2}}, sampler="grid")
    old = SearchStudy(space, "old000", tmp_path / "old.journal")
    while (proposal := old.ask()) is not None:
        old.finish(proposal, ended(proposal))
    study = SearchStudy(space, "abc123", journal)
    assert study.warm_start(old.records()) == (3, 0)
    trained = 0
    while (proposal := study.ask()) is not None:
        study.finish(proposal, ended(proposal))
        trained += 1
    assert trained == 3


def test_a_warm_start_that_was_killed_is_not_taken_twice(where: Path | str, tmp_path: Path, monkeypatch) -> None:
    space = small_space(search={"dilate": {"type": "int", "low": 1, "high": 19, "step": 2}}, sampler="grid")
    old = SearchStudy(space, "old000", tmp_path / "old.journal")
    for _ in range(6):
        proposal = old.ask()
        old.finish(proposal, ended(proposal))
    study = SearchStudy(space, "abc123", where)
    add, added = study._study.add_trial, []

    def killed(trial: optuna.trial.FrozenTrial) -> None:
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(trial)
        add(trial)

    monkeypatch.setattr(study._study, "add_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        study.warm_start(old.records())
    again = SearchStudy(space, "abc123", where)
    assert again.warm_start(old.records()) == (6, 0)
    assert len(again._study.get_trials(states=(TrialState.COMPLETE,))) == 6


def test_the_random_half_of_a_streak_is_not_the_first_half_again(journal: Path) -> None:
    space = small_space(search={"dilate": {"type": "int", "low": 1, "high": 99, "step": 2}}, sampler="random")
    study = SearchStudy(space, "abc123", journal)
    drawn = []
    for sampler in study._samplers:
        study._study.sampler = sampler
        drawn.append([study._study.ask().suggest_int("dilate", 1, 99, step=2) for _ in range(10)])
    assert drawn[0] != drawn[1]


def test_what_no_constraint_was_judged_for_is_not_shown_to_a_sampler(journal: Path) -> None:
    """A Gaussian process refuses trials that have been judged by fewer constraints than others."""
    search = {"delta_cls_loss": {"type": "float", "low": 0.001, "high": 1.0}}
    space = small_space(**HOLDING, **RECALL, search=search, sampler="gp", budget={"trials": 30})
    study = SearchStudy(space, "abc123", journal)
    for n in range(7):
        proposal = study.ask()
        study.finish(proposal, ended(proposal, value=n / 10, replays=replays(proposal, pr_curve=n / 10)))
    running = study.ask()
    study.report(running.number, 1, 0.3)
    assert study.ask() is not None


def test_a_kill_between_a_rung_and_its_hold_lets_nobody_pass(journal: Path) -> None:
    space = small_space(**HOLDING | {"scheduler": {"name": "asha", "min_epochs": 2, "reduction": 2}})
    study = SearchStudy(space, "abc123", journal)
    baseline = study.ask()
    study.finish(baseline, ended(baseline))
    first, second, worst = (study.ask() for _ in range(3))
    for proposal, compared in ((first, 0.9), (second, 0.8), (worst, 0.1)):
        study.report(proposal.number, 1, compared)
        study.report(proposal.number, 2, compared)
    assert study.leaves(first, 2) is None
    again = SearchStudy(space, "abc123", journal)  # killed before the others were held
    assert [again.ask() for _ in range(3)] == [first, second, worst]
    for proposal, compared in ((first, 0.0), (second, 0.9), (worst, 0.9)):
        again.report(proposal.number, 3, compared)
    assert again.leaves(worst, 3) == "not among the best at epoch 2"
    assert again.leaves(first, 3) is None  # it had passed before the kill


def test_one_that_failed_takes_nobody_s_place_at_the_end(journal: Path) -> None:
    space = small_space(**HOLDING)
    study = SearchStudy(space, "abc123", journal)
    baseline = study.ask()
    study.finish(baseline, ended(baseline))
    held = [hold_next(study, compared) for compared in (0.3,)]
    best = study.ask()
    study.report(best.number, 1, 0.5)
    assert study.leaves(best, 1) is None
    study.finish(best, ended(best, "diverged", value=None, replays=[]))
    assert study.ask(new=False) == held[0]


def test_a_held_trial_whose_network_was_trained_meanwhile_is_told_from_it(where: Path | str) -> None:
    space = small_space(**HOLDING, search=RULES, start_from=[{"learning_rate": 1.0, "threshold_rule": "grid"}])
    study = SearchStudy(space, "abc123", where)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, "failed", value=None, replays=[], ended=0.5))
    held = hold_next(study, 0.3)
    other = study.ask()
    assert other.params["threshold_rule"] != held.params["threshold_rule"]
    assert study.ask(new=False) is None  # its network is being trained
    study.finish(other, ended(other, ended=3.0))
    assert study.ask() is None
    found = {record["trial"]: record for record in study.records()}
    assert found[held.trial]["replayed_from"] == other.trial
    assert (found[held.trial]["status"], found[held.trial]["value"]) == ("completed", 0.5)


def test_a_kill_while_a_held_trial_is_taken_up_leaves_it_interrupted(where: Path | str, monkeypatch) -> None:
    space = small_space(**HOLDING)
    study = SearchStudy(space, "abc123", where)
    baseline = study.ask()
    study.finish(baseline, ended(baseline, ended=0.5))
    held = hold_next(study, 0.3)
    monkeypatch.setattr(study, "_passes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        study.ask(new=False)
    again = SearchStudy(space, "abc123", where)
    assert [record["trial"] for record in again.records()] == [baseline.trial]
    assert again.ask() == held
    assert again.let_go(for_good=True) == []


def test_masks_that_only_some_trials_search_are_compared(journal: Path) -> None:
    """Where the condition does not hold, all masks are kept."""
    search = {
        "optimizer": {"type": "categorical", "choices": ["sgd", "adam"]},
        "num_segmented": {"type": "categorical", "choices": [5, 10], "when": {"optimizer": "adam"}},
        "dilate": {"type": "int", "low": 1, "high": 9, "step": 2},
    }
    points = [{"optimizer": "sgd", "dilate": 3}, {"optimizer": "adam", "num_segmented": 5, "dilate": 3}]
    space = small_space(search=search, start_from=points, **HOLDING, **MASKS)
    study = SearchStudy(space, "abc123", journal)
    proposals = [study.ask() for _ in range(3)]
    for proposal in proposals:
        study.report(proposal.number, 1, 0.5)
    for proposal in proposals[-2:]:
        assert study.leaves(proposal, 1)
        study.hold(proposal, ended(proposal, "stopped_early", num_segmented=5))
    assert study.ask(new=False) is not None
