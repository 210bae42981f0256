"""A point of a search space from words KEY=VALUE, as somebody types them or as `wandb agent` passes them on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from model.config import RULES
from tuner.space import ChoiceParam, FloatParam, Param, Space
from tuner.space_file import range_in_words

_ROUNDING = 1e-9
"""So far beyond a bound, as a share, a value is the bound: a W&B sweep draws on a log scale and rounds."""


@dataclass(frozen=True)
class Point:
    """A whole point of a space, and what became of the words."""

    params: dict[str, Any]
    left_out: tuple[str, ...]
    """said, but their conditions are not met"""
    from_baseline: tuple[str, ...]
    """not said, so as in the baseline"""


def parse(space: Space, words: Iterable[str]) -> Point:
    """ValueError with every problem.

    A W&B sweep knows no conditions and sends every parameter; so what does not apply is left out.
    """
    problems: list[str] = []
    texts = _texts(space, words, problems)
    said = {name: _value(space.search[name], text) for name, text in texts.items()}
    problems += [
        f"{name}: {range_in_words(space.search[name])}, found {texts[name]!r}"
        for name, value in said.items()
        if value is None
    ]
    baseline = space.baseline_config(space.seed)
    params: dict[str, Any] = {}
    left_out, from_baseline = [], []
    for name, param in space.search.items():  # in the order of conditions
        applies = all(params.get(parent) in values for parent, values in param.when.items())
        if name in said and applies:
            params[name] = said[name]
        elif name in said:
            left_out.append(name)
        elif applies and param.contains(value := getattr(baseline, name)):
            params[name] = value
            from_baseline.append(name)
        elif applies:
            problems.append(
                f"{name}: {range_in_words(param)}, and the baseline, whose value holds where none is said, has "
                f"{value!r}; add {name}=VALUE"
            )
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ValueError("\n  ".join([f"--set: {count}:", *problems]))
    return Point(params, tuple(left_out), tuple(from_baseline))


def _texts(space: Space, words: Iterable[str], problems: list[str]) -> dict[str, str]:
    """The values as they are written, of searched parameters alone."""
    texts: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            problems.append(f"must be words KEY=VALUE, found {word!r}; write it as learning_rate=0.1")
        elif name not in space.search:
            problems.append(f"{name}: is not a searched parameter; {_instead(space, name)}")
        elif name in texts:
            problems.append(f"{name}: must be said once, found {texts[name]!r} and {text!r}; keep one")
        else:
            texts[name] = text
    return texts


def _instead(space: Space, name: str) -> str:
    known = f"those are {', '.join(space.search)}" if space.search else "this space searches nothing"
    if name == "seed":
        return "say --seed"
    if name in RULES:
        return f"{known}; what is fixed is edited in the space, under train"
    near = difflib.get_close_matches(name, space.search, n=1)
    return f"did you mean '{near[0]}'?" if near else known


def _value(param: Param, text: str) -> Any:
    """What a text stands for; None if the parameter does not take it. No field of a run may be null."""
    if isinstance(param, ChoiceParam):
        found = [choice for choice in param.choices if _is_written(choice, text)]
        return min(found, key=lambda choice: str(choice) != text, default=None)  # 1 and 1.0 may both be choices
    number = _number(text)
    if number is None:
        return None
    if isinstance(param, FloatParam):
        return _on_range(param, number)
    value = int(number)
    return value if value == number and param.contains(value) else None


def _is_written(choice: Any, text: str) -> bool:
    """Whether a text is how Python, JSON or YAML writes a choice."""
    if isinstance(choice, bool):
        return text.lower() == str(choice).lower()
    return text == choice if isinstance(choice, str) else _number(text) == choice


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _on_range(param: FloatParam, value: float) -> float | None:
    """The value, without what rounding has added to it."""
    nearest = min(max(value, param.low), param.high)
    if not math.isclose(nearest, value, rel_tol=_ROUNDING) or not param.contains(nearest):
        return None
    return nearest if param.step is None else param.values()[round((nearest - param.low) / param.step)]
