"""A space as a W&B sweep: whatever W&B may draw from it is a value of the space, and no value is left out."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner import space_file
from tuner.space import ChoiceParam, FloatParam, IntParam, Param, Space
from tuner.tracking.sweep import METRIC, sweep_config

DEMO = space_file.load("demo")


def searching(sampler: str = "tpe", **search: Param) -> Space:
    return replace(DEMO, search=search, sampler=sampler)


def described(param: Param, sampler: str = "tpe") -> dict[str, Any]:
    return sweep_config(searching(sampler, x=param), "synthetic")["parameters"]["x"]


@st.composite
def stepped_floats(draw: st.DrawFn) -> FloatParam:
    step = draw(st.sampled_from([0.001, 0.05, 0.1, 0.125, 0.3, 1.0, 7.0]))
    low = draw(st.sampled_from([0.0, step, 0.01, 0.1, -1.0, 3.0])) + draw(st.integers(-20, 20)) * step
    return FloatParam(low=low, high=low + draw(st.integers(0, 400)) * step, step=step)


@st.composite
def ints(draw: st.DrawFn) -> IntParam:
    step = draw(st.integers(1, 9))
    low = draw(st.integers(-50, 50))
    return IntParam(low=low, high=low + draw(st.integers(0, 300)) * step, step=step)


bounds = st.tuples(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6)).map(sorted)
floats = bounds.map(lambda b: FloatParam(low=b[0] - 1, high=b[1] - 1))
log_floats = bounds.map(lambda b: FloatParam(low=b[0], high=b[1], log=True))
whole = st.tuples(st.integers(1, 5000), st.integers(1, 5000)).map(sorted)
log_ints = whole.map(lambda b: IntParam(low=b[0], high=b[1], log=True))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
choices = st.lists(plain, min_size=1, unique_by=lambda v: (type(v), v)).map(lambda v: ChoiceParam(choices=tuple(v)))
countable = st.one_of(stepped_floats(), ints(), log_ints, choices)


def draw_as_wandb(one: dict[str, Any], share: float) -> Any:
    """The value that W&B draws for a share of 0 to 1, by the table of distributions in its documents."""
    if "value" in one:
        return one["value"]
    if "values" in one:
        return one["values"][min(int(share * len(one["values"])), len(one["values"]) - 1)]
    low, high, kind = one["min"], one["max"], one["distribution"]
    if kind == "int_uniform":
        return min(low + int(share * (high - low + 1)), high)
    if "log" in kind:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    value = min(max(value, low), high)  # "between min and max"; rounding aside
    if kind.startswith("q_"):
        value = round(value / one["q"]) * one["q"]
    else:
        assert kind in ("uniform", "log_uniform_values")
    return value


@given(st.one_of(floats, log_floats, countable), st.sampled_from(["tpe", "qmc"]), st.floats(0, 1))
def test_whatever_wandb_draws_lies_in_the_space(param, sampler, share) -> None:
    one = described(param, sampler)
    for value in (draw_as_wandb(one, share), draw_as_wandb(one, 0.0), draw_as_wandb(one, 1.0)):
        assert param.contains(value), one


@given(countable)
def test_a_grid_lists_all_values_with_their_types(param) -> None:
    one = described(param, "grid")
    values = one["values"] if "values" in one else [one["value"]]
    assert [(type(v), v) for v in values] == [(type(v), v) for v in param.values()]


@given(countable)
def test_no_value_is_left_out(param) -> None:
    one = described(param)
    if "values" in one:
        assert one["values"] == list(param.values())
    elif "value" in one:
        assert param.values() == (one["value"],)
    else:
        assert (one["min"], one["max"]) == (param.low, param.high)
        q = one.get("q", 1)
        for value in param.values():  # W&B's rounding leaves it where it is
            assert round(value / q) * q == pytest.approx(value, abs=1e-6 * q)


@given(st.one_of(floats, log_floats))
def test_continuous_ranges_are_whole(param) -> None:
    one = described(param)
    if param.low < param.high:
        assert one == {
            "distribution": "log_uniform_values" if param.log else "uniform",
            "min": param.low,
            "max": param.high,
        }


def as_written(param: FloatParam) -> FloatParam:
    """With bounds as a file has them; Optuna takes 0.14100000000000001 for no multiple of 0.001."""
    return replace(param, low=round(param.low, 9), high=round(param.high, 9))


@given(st.one_of(floats, log_floats, ints(), log_ints, choices, stepped_floats().map(as_written)))
def test_wandbs_own_reading_is_the_same_range(param) -> None:
    """wandb turns a sweep into Optuna's distributions for its local scheduler."""
    from wandb.sdk.sweeps.scheduler.optuna import sweep_parameter_to_distribution

    one = described(param)
    read = sweep_parameter_to_distribution(one)
    if "values" in one or "value" in one:
        assert list(read.choices) == (one["values"] if "values" in one else [one["value"]])
        return
    assert (read.low, read.high, read.log) == (param.low, param.high, param.log)
    assert read.step == (param.step if isinstance(param, IntParam) or param.step else None)


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (IntParam(low=1, high=10), {"distribution": "int_uniform", "min": 1, "max": 10}),
        (IntParam(low=1, high=7, step=2), {"values": [1, 3, 5, 7]}),
        (IntParam(low=0, high=1000, step=5), {"distribution": "q_uniform", "min": 0, "max": 1000, "q": 5}),
        (IntParam(low=1, high=1001, step=5), {"values": list(range(1, 1002, 5))}),
        (IntParam(low=1, high=512, log=True), {"distribution": "q_log_uniform_values", "min": 1, "max": 512, "q": 1}),
        (FloatParam(low=0.0, high=0.3, step=0.1), {"values": [0.0, 0.1, 0.2, 0.3]}),
        (FloatParam(low=0.0, high=2.0, step=0.01), {"distribution": "q_uniform", "min": 0.0, "max": 2.0, "q": 0.01}),
        (ChoiceParam(choices=(None, True, "all", 3)), {"values": [None, True, "all", 3]}),
        (FloatParam(low=0.5, high=0.5), {"value": 0.5}),
    ],
)
def test_kinds(param, expected) -> None:
    assert described(param) == expected


@pytest.mark.parametrize(
    ("sampler", "method"),
    [("tpe", "bayes"), ("gp", "bayes"), ("cmaes", "bayes"), ("qmc", "random"), ("random", "random"), ("grid", "grid")],
)
def test_methods(sampler, method) -> None:
    assert sweep_config(searching(sampler, dilate=IntParam(low=1, high=3)), "synthetic")["method"] == method


@pytest.mark.parametrize("name", [name for name in space_file.shipped() if name != "results_page"])
def test_shipped_spaces_pass_wandbs_own_check(name) -> None:
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

    space = space_file.load(name)
    config = sweep_config(space, "synthetic")
    assert _validate_config_and_fill_distribution(config) == config
    assert config["metric"] == {"name": METRIC, "goal": "maximize"}
    assert list(config["parameters"]) == list(space.search)
    assert config["name"] == name
    assert space.fingerprint() in config["description"]
    assert "run_cap" not in config


def test_the_agent_of_wandb_calls_tuner_trial() -> None:
    from wandb.sdk.launch.sweeps import utils

    config = sweep_config(DEMO, "/data/my cracks", source="/spaces/demo.yaml")
    params = {"learning_rate": 0.5, "augment_flips": True, "num_segmented": None}
    macros = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in params.items()}})
    words = []
    for word in utils.create_sweep_command(config["command"]):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    assert words == [
        "tuner", "trial", "/spaces/demo.yaml", "--data", "/data/my cracks", "--set",
        "learning_rate=0.5", "augment_flips=True", "num_segmented=None",
    ]  # fmt: skip


def test_a_space_that_searches_nothing_is_no_sweep() -> None:
    with pytest.raises(ValueError, match="needs a parameter to draw, found none under `search` of results_page"):
        sweep_config(space_file.load("results_page"), "synthetic")
