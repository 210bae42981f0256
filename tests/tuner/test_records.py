from pathlib import Path

import optuna
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from tuner import records
from tuner.records import RecordsFile


def record(trial: str, status: str = "completed", value: float | None = 0.5, **more: object) -> dict:
    return {
        "trial": trial,
        "status": status,
        "value": value,
        "baseline": False,
        "replayed_from": None,
        "ended": 1.0,
    } | more


def test_the_file_holds_the_records_in_their_order(tmp_path: Path) -> None:
    first, second, third = record("a"), record("b"), record("c")
    file = RecordsFile(tmp_path)
    file.write([first, third])
    assert records.read(tmp_path) == [first, third]
    file.write([first, second, third])  # an earlier trial that ended later
    assert records.read(tmp_path) == [first, second, third]
    before = (tmp_path / records.FILE).stat().st_mtime_ns
    file.write([first, second, third])
    assert (tmp_path / records.FILE).stat().st_mtime_ns == before
    file.write([first, third])  # a trial that was held goes on
    assert records.read(tmp_path) == [first, third]
    later = second | {"ended": 2.0, "value": 0.7}
    file.write([first, later, third])
    assert records.read(tmp_path) == [first, later, third]


def test_a_new_session_writes_the_file_again_from_the_study(tmp_path: Path) -> None:
    (tmp_path / records.FILE).write_text("cut sho")
    RecordsFile(tmp_path).write([record("a")])
    assert records.read(tmp_path) == [record("a")]
    (tmp_path / records.FILE).write_text("x")
    RecordsFile(tmp_path).write([])
    assert records.read(tmp_path) == []


def test_only_what_was_completed_can_be_best() -> None:
    found = [record("a"), record("b", "stopped_early", 0.9), record("c", value=0.5), record("d", value=None)]
    assert records.best(found) == found[0]
    assert records.best(found[1:2]) is None
    assert records.charged([*found, record("e", replayed_from="a")]) == found
    assert records.count(found) == {"completed": 3, "stopped_early": 1, "diverged": 0, "failed": 0}
    assert records.reasons([record("a", reason=None), *[record(n, "failed", reason="a bug") for n in "bc"]]) == [
        ("failed", "a bug", 2)
    ]


def test_what_violates_a_constraint_wins_nothing() -> None:
    met, beyond = {"recall": 0.0, "f1": 0.0}, {"recall": 0.25, "f1": 0.0}
    found = [record("a", value=0.4, violations=met), record("b", value=0.9, violations=beyond)]
    assert records.best(found) == found[0]
    assert records.nearest(found) is None
    stopped = record("c", "stopped_early", violations=met)
    none = [
        record("a", value=0.9, violations={"recall": 0.25, "f1": 0.5}),
        record("b", value=0.3, violations={"recall": 0.25, "f1": 0.125}),
        record("c", value=0.4, violations={"recall": 0.0, "f1": 0.375}),
        stopped,
    ]
    assert records.best(none) is None
    assert records.nearest(none) == none[2]
    assert records.none_feasible(none[2]) == (
        "no completed trial meets the constraints; c comes nearest: f1 0.375 beyond its bound"
    )
    assert records.beyond(met) == "met"
    assert records.nearest([stopped]) is None


def test_the_front_is_shown_by_cost_and_a_pair_of_values_once() -> None:
    rows = [("a", [0.5, 30]), ("b", [0.8, 40]), ("c", [0.5, 30]), ("d", [0.4, 35]), ("e", [0.3, 10])]
    found = [record(name, value=values[0], values=values, params={"x": name}) for name, values in rows]
    found += [record("f", "stopped_early", value=0.9, values=[0.9, 5]), record("g", value=0.7, values=None)]
    assert [r["trial"] for r in records.pareto_front(found, ["max", "min"])] == ["a", "b", "c", "e"]
    assert records.front(found, ["max", "min"]) == [
        {"trial": "e", "values": [0.3, 10], "params": {"x": "e"}},
        {"trial": "a", "values": [0.5, 30], "params": {"x": "a"}},
        {"trial": "b", "values": [0.8, 40], "params": {"x": "b"}},
    ]
    assert records.front(found, ["max"]) is None
    assert records.front([], ["max", "min"]) == []


STATES = {"completed": TrialState.COMPLETE, "stopped_early": TrialState.PRUNED, "failed": TrialState.FAIL}


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([0.0, 0.0, 0.5]), st.sampled_from([*STATES])),
        max_size=12,
    ),
    st.lists(st.sampled_from(["max", "min"]), min_size=2, max_size=2),
)
def test_the_front_is_that_of_optuna(trials: list[tuple[int, int, float, str]], modes: list[str]) -> None:
    """Few values, so that many are equal in one objective or in both."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=[f"{mode}imize" for mode in modes])
    found = []
    for n, (first, second, violation, status) in enumerate(trials):
        values = [first / 4, float(second)]
        completed = {"values": values} if status == "completed" else {}
        study.add_trial(optuna.trial.create_trial(state=STATES[status], constraints={"recall": violation}, **completed))
        found.append(record(str(n), status, first / 4, values=values, violations={"recall": violation}))
    front = records.pareto_front(found, modes)
    assert [r["trial"] for r in front] == [str(trial.number) for trial in study.best_trials]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=12),
    st.data(),
)
def test_whoever_may_still_win_is_never_ruled_out(judged: list[list[int]], data: st.DataObject) -> None:
    """Networks judged in two ways, of which each was told one; the other may be told at any time."""
    found = [
        record(f"n{n}", value=values[0] / 10, replays=[{"value": v / 10} for v in values])
        for n, values in enumerate(judged)
    ]
    out = records.cannot_win(found)
    assert len(found) - len(out) >= min(3, len(found))
    later = [
        record(f"r{n}", value=judged[n][1] / 10, replayed_from=f"n{n}", replays=[])
        for n in data.draw(st.sets(st.sampled_from(range(len(judged)))))
    ]
    winner = records.best(found + later)
    assert (winner["replayed_from"] or winner["trial"]) not in out
    bounded = [one | {"violations": {"recall": 0.0}} for one in found]
    assert records.cannot_win(bounded) == set()
