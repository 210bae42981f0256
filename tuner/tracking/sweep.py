"""A search space as a sweep of W&B: what `wandb agent` draws from, and what a search's sweep page is made of.

Every value that W&B may draw lies in the space. W&B knows no conditions, so each parameter is drawn always, and
`tuner trial` drops those that do not apply. Pure: the configuration's form is that of wandb 0.31.
"""

from __future__ import annotations

from typing import Any

from tuner.space import ChoiceParam, FloatParam, IntParam, Param, Space

METRIC = "best/value"
"""of a run's summary: the objective at its best epoch"""

_METHODS = {"grid": "grid", "random": "random", "qmc": "random"}
_MOST_LISTED = 100
"""Steps that are listed one by one; beyond, W&B rounds to them where its rounding meets our grid."""


def sweep_config(
    space: Space,
    data: str,
    *,
    source: str | None = None,
    name: str | None = None,
    project: str | None = None,
    run_cap: int | None = None,
) -> dict[str, Any]:
    """The sweep's configuration. `data` and `source`, the space's name if not given, are what `tuner trial` is told:
    agents run wherever they are started, so a path should be absolute. ValueError where nothing is searched."""
    if not space.search:
        raise ValueError(
            f"a W&B sweep needs a parameter to draw, found none under `search` of {space.name}; take a space that "
            "searches something"
        )
    figure = space.objective
    searched = " and ".join(f"{one.metric} ({one.mode})" for one in space.objectives)
    method = _METHODS.get(space.sampler, "bayes")
    return {
        "name": name or space.name,
        "description": f"search space {space.name} ({space.fingerprint()}) of segdec-tuner: {searched}",
        **({"project": project} if project else {}),
        "program": "tuner",
        "command": ["tuner", "trial", source or space.name, "--data", data, "--set", "${args_no_hyphens}"],
        "method": method,
        "metric": {"name": METRIC, "goal": "maximize" if figure.mode == "max" else "minimize"},
        "parameters": {name: _parameter(param, listed=method == "grid") for name, param in space.search.items()},
        **({"run_cap": run_cap} if run_cap else {}),
    }


def _parameter(param: Param, listed: bool) -> dict[str, Any]:
    """What a value is drawn from. `listed`: all values one by one, which is what a grid is documented to take."""
    if isinstance(param, ChoiceParam):
        return {"values": list(param.choices)}
    if param.low == param.high:  # W&B refuses such a range
        return {"value": param.low}
    bounds = {"min": param.low, "max": param.high}
    if isinstance(param, FloatParam) and param.step is None:
        return {"distribution": "log_uniform_values" if param.log else "uniform", **bounds}
    if not listed:
        if param.log:
            return {"distribution": "q_log_uniform_values", **bounds, "q": 1}
        if param.step == 1 and isinstance(param, IntParam):
            return {"distribution": "int_uniform", **bounds}
        if len(param.values()) > _MOST_LISTED and _is_rounded_to_our_grid(param):
            return {"distribution": "q_uniform", **bounds, "q": param.step}
    return {"values": list(param.values())}


def _is_rounded_to_our_grid(param: FloatParam | IntParam) -> bool:
    """W&B rounds to the multiples of q from 0 on; our steps count from `low`."""
    step = param.step
    assert step is not None
    return all(param.contains(round(end / step) * step) for end in (param.low, param.high))
