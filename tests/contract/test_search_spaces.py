"""Every shipped search space loads, and every kind of point of it is a valid run."""

import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from model.config import RunConfig
from tuner import space_file
from tuner.space import ChoiceParam, FloatParam, Param, Space

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


def draw(space: Space, rng: random.Random) -> dict[str, Any]:
    params = {name: draw_value(param, rng) for name, param in space.search.items()}
    return {name: params[name] for name in space.active(params)}


def draw_value(param: Param, rng: random.Random) -> Any:
    if isinstance(param, ChoiceParam):
        return rng.choice(param.choices)
    if isinstance(param, FloatParam):
        return rng.uniform(param.low, param.high)
    return rng.randrange(param.low, param.high + 1, param.step)


def test_the_shipped_ones_are_these() -> None:
    names = ["annotation_budget", "crack_segmentation", "crackforest", "crackforest_folds", "crackseg448", "demo"]
    assert list(space_file.shipped()) == [*names, "results_page"]
    assert [path.stem for path in SPACES] == list(space_file.shipped())


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_shipped_space_is_whole(path: Path) -> None:
    space = space_file.load(path)
    assert space.name == path.stem
    assert path.read_text().startswith("# ")
    jsonschema.validate(yaml.safe_load(path.read_text()), space_file.schema())
    rng = random.Random(0)
    corners = [{name: param.samples()[side] for name, param in space.search.items()} for side in (0, -1)]
    points = [{name: corner[name] for name in space.active(corner)} for corner in corners]
    for params in points + [draw(space, rng) for _ in range(50)]:
        assert space.contains(params)
        assert isinstance(space.config(params, seed=1), RunConfig)
    assert isinstance(space.baseline_config(seed=1), RunConfig)


def test_the_results_page_is_its_own_baseline() -> None:
    space = space_file.load("results_page")
    assert space.baseline_params() == {}
    assert space.config({}, 0) == space.baseline_config(0)
    assert (
        space_file.load("crack_segmentation").baseline_params() == space_file.load("crack_segmentation").start_from[0]
    )
