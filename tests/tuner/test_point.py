"""Points of a space from words, as a person types them and as `wandb agent` sends them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from tests.tuner.conftest import small_space
from tuner import space_file
from tuner.point import parse
from tuner.space import FloatParam, IntParam, Param, Space

SEARCH = {
    "learning_rate": {"type": "float", "low": 1e-5, "high": 2.0, "log": True},
    "delta_cls_loss": {"type": "float", "low": 0.0, "high": 1.0},
    "lower_threshold": {"type": "float", "low": 0.3, "high": 1.0, "step": 0.1},
    "dilate": {"type": "int", "low": 3, "high": 15, "step": 2},
    "hard_mining_places": {"type": "int", "low": 1, "high": 4096, "log": True},
    "num_segmented": {"type": "categorical", "choices": [5, "all", 10]},
    "weight_power": {"type": "categorical", "choices": [1, 1.0, 2.5, 1e-7]},
    "blacken": {"type": "categorical", "choices": [False, True]},
    "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
    "threshold_factor": {"type": "int", "low": 1, "high": 10, "when": {"threshold_rule": "pr_curve"}},
}
SPACE = small_space(search=SEARCH)
SPACES = [SPACE, *map(space_file.load, space_file.shipped().values())]
ALL_SET = {
    "learning_rate": 0.1, "delta_cls_loss": 0.5, "lower_threshold": 0.5, "dilate": 3, "hard_mining_places": 7,
    "num_segmented": "all", "weight_power": 2.5, "blacken": True, "threshold_rule": "pr_curve", "threshold_factor": 2,
}  # fmt: skip


def values(param: Param) -> st.SearchStrategy[Any]:
    if isinstance(param, FloatParam) and param.step is None:
        return st.floats(param.low, param.high)
    if isinstance(param, IntParam):
        return st.sampled_from(range(param.low, param.high + 1, param.step))
    return st.sampled_from(param.values())


def as_python(value: Any) -> str:
    """What the agent itself does with what it was sent."""
    [word] = create_sweep_command_args({"args": {"x": {"value": value}}})["args_no_hyphens"]
    return word.removeprefix("x=")


def through_json(value: Any) -> str:
    return json.dumps(value).strip('"')


def number_of_the_other_kind(value: Any) -> str:
    """3 as 3.0, and 1.0 as 1, as JSON has but one kind of numbers."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(float(value)) if type(value) is int else as_python(value)


@given(space=st.sampled_from(SPACES), data=st.data())
def test_any_point_comes_back_however_it_is_written(space: Space, data: st.DataObject) -> None:
    everything = {name: data.draw(values(param), name) for name, param in space.search.items()}
    wanted = {name: everything[name] for name in space.active(everything)}
    write = data.draw(st.sampled_from([as_python, through_json, number_of_the_other_kind]))
    words = [f"{name}={write(value)}" for name, value in everything.items()]
    point = parse(space, data.draw(st.permutations(words)))
    assert point.params == wanted
    assert list(point.params) == [name for name in space.search if name in wanted]
    assert set(point.left_out) == set(everything) - set(wanted)
    assert point.from_baseline == ()
    assert space.contains(point.params)
    if write is as_python:
        assert list(map(type, point.params.values())) == [type(wanted[name]) for name in point.params]


@given(value=st.floats(allow_nan=True, allow_infinity=True) | st.text())
def test_whatever_is_written_is_a_value_of_the_space_or_refused(value: object) -> None:
    for name, param in SPACE.search.items():
        words = [f"{key}={v}" for key, v in (ALL_SET | {name: value}).items()]
        with suppress(ValueError):
            params = parse(SPACE, words).params
            assert SPACE.contains(params)
            kind = {FloatParam: float, IntParam: int}.get(type(param))
            assert kind is None or name not in params or type(params[name]) is kind


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "2.0000000000000004", 2.0),  # exp(log(2)) of somebody else
        ("learning_rate", "9.999999999999999e-06", 1e-5),
        ("lower_threshold", "0.9", pytest.approx(0.9)),
        ("dilate", "3.0", 3),
        ("hard_mining_places", "1e3", 1000),
        ("blacken", "true", True),
        ("blacken", "False", False),
        ("num_segmented", "10.0", 10),
        ("num_segmented", "all", "all"),
        ("weight_power", "1", 1),
        ("weight_power", "1.0", 1.0),
    ],
)
def test_how_a_value_may_be_written(name: str, text: str, value: Any) -> None:
    found = parse(SPACE, [f"{key}={v}" for key, v in (ALL_SET | {name: text}).items()]).params[name]
    assert found == value
    assert name == "lower_threshold" or type(found) is type(value)
    assert SPACE.search[name].contains(found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dilate", "3.5"), ("dilate", "true"), ("dilate", ""), ("dilate", "9" * 5000), ("learning_rate", "1e400"),
        ("learning_rate", "2.0001"), ("learning_rate", "0,5"), ("lower_threshold", "0.35"), ("blacken", "1"),
        ("num_segmented", "All"), ("num_segmented", "7"), ("threshold_rule", "None"),
    ],
)  # fmt: skip
def test_what_no_value_is_written_as(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"\A--set: 1 problem:\n  {name}: must be .*, found '{text}'\Z"):
        parse(SPACE, [f"{key}={v}" for key, v in (ALL_SET | {name: text}).items()])


def test_a_step_of_a_float_is_the_one_that_the_sampler_knows() -> None:
    grid = SPACE.search["lower_threshold"].values()
    assert 0.3 + 6 * 0.1 != 0.9
    found = [
        parse(SPACE, [f"{k}={v}" for k, v in (ALL_SET | {"lower_threshold": n / 10}).items()]) for n in range(3, 11)
    ]
    assert [point.params["lower_threshold"] for point in found] == list(grid)


def test_what_is_not_said_is_as_in_the_baseline_where_that_applies() -> None:
    space = small_space(search=SEARCH | {"dilate": {"type": "int", "low": 1, "high": 15, "step": 2}, "hard_mining_places": {"type": "int", "low": 0, "high": 9}, "weight_power": {"type": "categorical", "choices": [1.0, 2.0]}})  # fmt: skip
    point = parse(space, ["learning_rate=0.5"])
    baseline = space.baseline_config(0)
    assert point.from_baseline == tuple(name for name in space.search if name != "learning_rate")
    assert point.params == {name: getattr(baseline, name) for name in space.search} | {"learning_rate": 0.5}
    point = parse(space, ["threshold_rule=grid", "threshold_factor=3"])
    assert (point.left_out, "threshold_factor" in point.params) == (("threshold_factor",), False)
    assert "threshold_factor" not in point.from_baseline
    point = parse(space, ["threshold_rule=grid"])
    assert (point.left_out, "threshold_factor" in point.params) == ((), False)


def test_every_problem_comes_in_one_error() -> None:
    words = [
        "learning_rate=5", "learning_rate=0.5", "dilat=3", "width=0.2", "seed=3", "dilate=4", "blacken=maybe",
        "delta_cls_loss=nan", "x", "threshold_factor=99", "weight_power=1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--set: 11 problems:") as caught:
        parse(SPACE, words)
    assert type(caught.value) is ValueError
    assert str(caught.value).splitlines()[1:] == [
        "  learning_rate: must be said once, found '5' and '0.5'; keep one",
        "  dilat: is not a searched parameter; did you mean 'dilate'?",
        f"  width: is not a searched parameter; those are {', '.join(SEARCH)}; what is fixed is edited in the space, under train",
        "  seed: is not a searched parameter; say --seed",
        "  must be words KEY=VALUE, found 'x'; write it as learning_rate=0.1",
        "  learning_rate: must be a number from 1e-05 to 2, found '5'",
        "  dilate: must be a whole number from 3 to 15 in steps of 2, found '4'",
        "  blacken: must be one of False, True, found 'maybe'",
        "  delta_cls_loss: must be a number from 0 to 1, found 'nan'",
        "  threshold_factor: must be a whole number from 1 to 10, found '99'",
        "  hard_mining_places: must be a whole number from 1 to 4096, and the baseline, whose value holds where none is "
        "said, has 0; add hard_mining_places=VALUE",
    ]


def test_a_space_that_searches_nothing_takes_nothing() -> None:
    space = small_space(search={})
    assert parse(space, []).params == {}
    with pytest.raises(ValueError, match="dilate: is not a searched parameter; this space searches nothing"):
        parse(space, ["dilate=1"])
