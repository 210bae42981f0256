"""Which trials are stopped, from curves alone."""

from hypothesis import given
from hypothesis import strategies as st

from tuner.schedulers import compares, leaves, may_go_on, promoted, rungs
from tuner.space import Scheduler

ASHA = Scheduler(name="asha", min_epochs=2, reduction=3)
HYPERBAND = Scheduler(name="hyperband", min_epochs=1, reduction=3)
TOP_TWO = Scheduler(name="top_k", keep=2)
MEDIAN = Scheduler(name="median", min_epochs=2)


def test_rungs_are_epochs_before_the_last() -> None:
    assert rungs(ASHA, 50) == [2, 6, 18]
    assert rungs(ASHA, 18) == [2, 6]
    assert rungs(ASHA, 2) == []
    assert rungs(Scheduler(), 50) == rungs(MEDIAN, 50) == []


def test_hyperband_deals_trials_to_brackets_that_begin_later() -> None:
    dealt = [tuple(rungs(HYPERBAND, 20, number)) for number in range(7)]
    assert sorted(dealt) == [(1, 3, 9)] * 4 + [(3, 9)] * 2 + [(9,)]
    assert dealt == [tuple(rungs(HYPERBAND, 20, number)) for number in range(7, 14)]


def curves_of(*values: float, epoch: int = 2) -> dict[int, dict[int, float]]:
    return {number: {epoch: value} for number, value in enumerate(values)}


def test_a_rung_lets_its_best_third_go_on() -> None:
    seen = curves_of(0.1, 0.4, 0.6, 0.2, 0.3, 0.5, 0.0)
    stays = {number for number in seen if leaves(ASHA, 50, number, 0, seen) is None}
    assert stays == {2, 5}
    assert leaves(ASHA, 50, 0, 0, seen) == "not among the best at epoch 2"
    assert leaves(ASHA, 50, 1, 0, curves_of(0.1, 0.4)) is not None  # of two, nobody is a third


def test_of_equals_the_earlier_one_goes_on() -> None:
    seen = curves_of(0.5, 0.5, 0.5)
    assert [leaves(ASHA, 50, number, 0, seen) is None for number in seen] == [True, False, False]


def test_a_held_trial_goes_on_when_it_turns_out_to_be_among_the_best() -> None:
    seen = curves_of(0.3, 0.2)
    assert promoted(ASHA, 50, [0, 1], [], seen, no_more=False) is None
    seen |= {2: {2: 0.1}}
    assert promoted(ASHA, 50, [0, 1, 2], [], seen, no_more=False) == 0
    assert promoted(ASHA, 50, [1, 2], [0], seen, no_more=False) is None  # that place is taken
    seen |= {number: {2: 0.0} for number in range(3, 6)}
    assert promoted(ASHA, 50, [1, 2, 3, 4, 5], [0], seen, no_more=False) == 1


def test_who_has_come_furthest_goes_on_first() -> None:
    seen = {number: {2: 0.9 - number / 10} for number in range(9)} | {n: {2: 0.5, 6: 0.1 * n} for n in (9, 10, 11)}
    assert promoted(ASHA, 50, range(12), [], seen, no_more=False) == 11
    assert promoted(ASHA, 50, [*range(9), 9, 10], [], seen, no_more=False) == 0


def test_where_no_more_come_the_best_of_few_goes_on() -> None:
    seen = curves_of(0.3, 0.4)
    assert promoted(ASHA, 50, [0, 1], [], seen, no_more=True) == 1
    assert promoted(ASHA, 50, [0, 1], [7], seen, no_more=True) is None  # 7 is on the way to this rung
    seen |= {1: {2: 0.4, 6: 0.1}}
    assert promoted(ASHA, 50, [0, 1], [], seen, no_more=True) == 1
    assert promoted(ASHA, 50, [0], [1], seen, no_more=True) is None  # the place at epoch 2 is taken


def test_only_those_that_reached_the_rung_are_compared() -> None:
    seen = {0: {1: 0.9}, 1: {1: 0.5, 2: 0.5}, 2: {1: 0.1, 2: 0.2}, 3: {1: 0.1, 2: 0.3}}
    assert leaves(ASHA, 50, 2, 0, seen) == "not among the best at epoch 2"
    assert leaves(ASHA, 50, 1, 0, seen) is None
    assert leaves(ASHA, 50, 0, 0, seen) is None


def test_brackets_compare_among_themselves() -> None:
    skips_one = next(n for n in range(7) if rungs(HYPERBAND, 20, n) == [3, 9])
    first = [n for n in range(14) if rungs(HYPERBAND, 20, n) == [1, 3, 9]]
    seen = {n: {1: 0.9, 2: 0.9, 3: 0.9} for n in first} | {skips_one: {1: 0.1, 2: 0.1, 3: 0.1}}
    assert promoted(HYPERBAND, 20, [skips_one], [], seen, no_more=True) == skips_one
    assert promoted(HYPERBAND, 20, [skips_one], first, seen, no_more=True) == skips_one  # those are of another
    assert leaves(HYPERBAND, 20, first[-1], 0, seen | {first[-1]: {1: 0.1}}) == "not among the best at epoch 1"


def test_a_rung_that_was_passed_in_a_lost_moment_is_compared_after_all() -> None:
    seen = {n: {1: 0.5, 2: 0.5, 3: 0.5} for n in (0, 1)} | {2: {1: 0.1, 2: 0.2, 3: 0.9}}
    assert leaves(ASHA, 50, 2, 0, seen) == "not among the best at epoch 2"
    assert leaves(ASHA, 50, 2, 2, seen) is None


def test_top_k_waits_for_all_and_lets_k_go_on() -> None:
    assert rungs(TOP_TWO, 50) == [1]
    seen = curves_of(0.3, 0.4, 0.2, 0.1, epoch=1)
    assert all(leaves(TOP_TWO, 50, number, 0, seen) for number in seen)
    assert promoted(TOP_TWO, 50, range(4), [], seen, no_more=False) is None
    assert promoted(TOP_TWO, 50, range(4), [4], seen, no_more=True) is None  # one has not been seen yet
    assert promoted(TOP_TWO, 50, range(4), [], seen, no_more=True) == 1
    assert promoted(TOP_TWO, 50, [0, 2, 3], [1], seen, no_more=True) == 0
    assert promoted(TOP_TWO, 50, [2, 3], [0, 1], seen, no_more=True) is None


def test_the_median_rule() -> None:
    others = {n: {1: 0.4, 2: 0.6, 3: 0.8} for n in range(3)}
    assert leaves(MEDIAN, 50, 9, 0, others | {9: {1: 0.45}}) is None  # too early
    assert leaves(MEDIAN, 50, 9, 0, others | {9: {1: 0.45, 2: 0.3}}) is not None  # its best, 0.45, against means of 0.5
    assert leaves(MEDIAN, 50, 9, 0, others | {9: {1: 0.55, 2: 0.3}}) is None
    two = {n: curve for n, curve in others.items() if n < 2}
    assert leaves(MEDIAN, 50, 9, 0, two | {9: {1: 0.1, 2: 0.1}}) is None  # too few to compare with


@given(
    st.sampled_from([ASHA, HYPERBAND, MEDIAN, TOP_TWO, Scheduler()]),
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=20), max_size=12),
)
def test_the_best_at_every_epoch_goes_on_to_the_end(scheduler: Scheduler, values: list[list[float]]) -> None:
    """At once or, where it was held, at the latest when no more come."""
    others = {n: dict(enumerate(row, start=1)) for n, row in enumerate(values)}
    for reached in range(1, 20):
        seen = others | {99: dict.fromkeys(range(1, reached + 1), 1.5)}
        if leaves(scheduler, 20, 99, reached - 1, seen) is None:
            continue
        assert may_go_on(scheduler)
        assert promoted(scheduler, 20, [99], [], seen, no_more=True) == 99


@given(st.sampled_from([ASHA, HYPERBAND, MEDIAN, TOP_TWO, Scheduler()]), st.integers(0, 20), st.integers(1, 19))
def test_nothing_leaves_where_nothing_is_compared(scheduler: Scheduler, number: int, reached: int) -> None:
    seen = {n: dict.fromkeys(range(1, 20), 0.9) for n in range(100, 130)}
    seen |= {number: dict.fromkeys(range(1, reached + 1), 0.1)}
    left = leaves(scheduler, 20, number, reached - 1, seen) is not None
    assert left == compares(scheduler, 20, number, reached - 1, reached)
