"""Reads search spaces: YAML files -> tuner.space objects. Every problem of a file comes in one error.

The format is in docs/search-spaces.md and, for editors and other programs, in `tuner schema`.
"""

from __future__ import annotations

import difflib
import math
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from model.config import DEFAULTS, RULES, CrossValidation, input_size_problem
from model.layouts import LAYOUTS
from tuner.space import (
    COMPARED,
    CONSTRAINED_METRICS,
    COSTS,
    DECISION_METRICS,
    LONGEST_NAME,
    MASK_COSTS,
    METRICS,
    NAME_RULE,
    PREFERRED,
    SAMPLERS,
    SCHEDULERS,
    SHARED_WITH_BASELINE,
    Budget,
    ChoiceParam,
    Constraint,
    DataOptions,
    FloatParam,
    IntParam,
    Labelling,
    Objective,
    Param,
    Repeats,
    Scheduler,
    Space,
    SpaceError,
    fields_of,
    is_name,
    is_number,
    on_grid,
)  # fmt: skip

_ELSEWHERE = {"seed": "seed, at the top level", "input_height": "data.height", "input_width": "data.width"}
"""Fields of RunConfig that a search space sets in another place."""
TUNABLE = tuple(name for name in RULES if name not in _ELSEWHERE)

_TOP_KEYS = (
    "name", "data", "train", "search", "objective", "constraints", "labelling", "cross_validation", "sampler",
    "scheduler", "budget", "repeats", "start_from", "seed",
)  # fmt: skip
_REQUIRED_KEYS = ("name", "data", "search", "budget")
_LARGEST_GRID = 100_000
_MOST_FOLDS = 20
_BUDGET_KEYS = ("trials", "hours", "device_hours", "money", "price_per_device_hour")


def load(source: str | Path) -> Space:
    """Reads a search-space file, or a shipped one by its name. SpaceError with every problem."""
    path = _find(source)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise SpaceError(str(source), [f"is not valid YAML: {error}"]) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"byte 0x{error.object[error.start]:02x} in line {line}"
        raise SpaceError(str(source), [f"must be text in UTF-8, found {found}; save it as UTF-8"]) from error
    return parse(document, str(source))


def shipped() -> dict[str, Path]:
    """The search spaces that come with the package, by name."""
    packaged = Path(str(resources.files("tuner"))) / "search_spaces"
    folder = packaged if packaged.is_dir() else packaged.parents[1] / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.stem in shipped() and str(source) in (path.stem, f"search_spaces/{path.stem}.yaml"):
        return shipped()[path.stem]
    near = difflib.get_close_matches(path.stem, shipped(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"the shipped ones are {', '.join(shipped())}"
    raise SpaceError(str(source), [f"there is no such file, and no shipped search space of this name; {hint}"])


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
        return dict(super().construct_mapping(node, deep))


def parse(document: Any, source: str = "search space") -> Space:
    """Validates a document. SpaceError with every problem."""
    reader = _Reader()
    space = reader.space(document)
    if reader.problems:
        raise SpaceError(source, reader.problems)
    assert space is not None
    return space


_MISSING: Any = object()


class _Reader:
    """Takes a document apart and collects what is wrong with it."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def space(self, document: Any) -> Space | None:
        if not self.mapping("the file", document, _TOP_KEYS, required=_REQUIRED_KEYS):
            return None
        name = self.value(document, "name", str, f"must be a word for file names: {NAME_RULE}", check=is_name)
        most = RULES["seed"].high or 0
        rule = f"must be a whole number from 0 to {most}"
        seed = self.value(document, "seed", int, rule, 0, check=lambda v: 0 <= v <= most)
        data = self.data(document.get("data", {}))
        train = self.train(document.get("train", {}))
        search = self.search(document.get("search", {}), train)
        objective, cost = self.objectives(document.get("objective", {}))
        constraints = self.constraints(document.get("constraints", []))
        labelling = self.labelling(document["labelling"]) if "labelling" in document else None
        sampler = self.value(
            document, "sampler", str, f"must be one of {', '.join(SAMPLERS)}", "tpe", SAMPLERS.__contains__
        )
        cross_validation = self.cross_validation(document)
        length = ("train.epochs", train.get("epochs", DEFAULTS["epochs"]))
        if cross_validation:
            length = ("cross_validation.folds", cross_validation.folds)
        scheduler = self.scheduler(document.get("scheduler", "none"), *length)
        budget = self.budget(document.get("budget", {}))
        repeats = self.repeats(document["repeats"]) if "repeats" in document else None
        space = Space(
            name=name, data=data, train=train, search=search, objective=objective, sampler=sampler,
            scheduler=scheduler, budget=budget, start_from=(), seed=seed, cost=cost, constraints=constraints,
            repeats=repeats, labelling=labelling, cross_validation=cross_validation,
        )  # fmt: skip
        self.sampler_fits(space)
        self.cost_fits(space)
        self.labelling_fits(space, is_said="labelling" in document)
        self.scheduler_fits(space, *length)
        self.repeats_fit(space)
        self.late_decision(space)
        points = self.start_from(space, document.get("start_from", []))
        if not self.problems:  # what follows needs the single values to be right
            self.corners(space)
        return None if self.problems else Space(**{**fields_of(space), "start_from": points})

    def problem(self, key: str, rule: str, found: Any = _MISSING, way_out: str = "") -> None:
        shown = "" if found is _MISSING else f", found {_shown(found)}"
        self.problems.append(f"{key}: {rule}{shown}{'; ' + way_out if way_out else ''}")

    def mapping(self, key: str, value: Any, known: tuple[str, ...], required: tuple[str, ...] = ()) -> bool:
        if not isinstance(value, dict):
            self.problem(key, "must be a mapping of keys to values", value)
            return False
        prefix = "" if key == "the file" else f"{key}."
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                self.problem(
                    f"{prefix}{name}", "is not a known key",
                    way_out=f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(known)}",
                )  # fmt: skip
        for name in required:
            if name not in value:
                self.problem(f"{prefix}{name}", "is missing", way_out="add it")
        return True

    def value(
        self,
        mapping: dict[str, Any],
        key: str,
        kind: type,
        rule: str,
        default: Any = None,
        check: Any = None,
        at: str = "",
    ) -> Any:
        """One value of a type, or `default`; a problem if it breaks the rule."""
        if key not in mapping:
            return default
        value = mapping[key]
        right = is_number(value) if kind is float else type(value) is kind
        if not right or (check is not None and not check(value)):
            self.problem(f"{at}{key}", rule, value, _number_hint(value, kind))
            return default
        return float(value) if kind is float else value

    def data(self, value: Any) -> DataOptions:
        if not self.mapping("data", value, tuple(DataOptions.__dataclass_fields__)):
            return DataOptions()
        layout = self.value(
            value, "layout", str, f"must be one of {', '.join(LAYOUTS)}", "auto", LAYOUTS.__contains__, "data."
        )
        sizes = [
            self.value(value, side, int, "must be a whole number of px above 0", 448, lambda v: v > 0, "data.")
            for side in ("height", "width")
        ]
        if problem := input_size_problem(*sizes):
            self.problem("data", problem)
        shares = [
            self.value(
                value, f"{split}_share", float, "must be a share between 0 and 1", 0.15, lambda v: 0 < v < 1, "data."
            )
            for split in ("validation", "test")
        ]
        if sum(shares) >= 0.9:
            self.problem("data", "validation_share and test_share must leave at least 0.1 to training", sum(shares))
        return DataOptions(
            layout=layout, height=sizes[0], width=sizes[1], validation_share=shares[0], test_share=shares[1]
        )

    def train(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.problem("train", "must be a mapping of keys to values", value)
            return {}
        return {
            name: fixed
            for name, fixed in value.items()
            if self.tunable("train", name) and self.fits("train", name, fixed)
        }

    def tunable(self, section: str, name: str) -> bool:
        if name in _ELSEWHERE:
            self.problem(f"{section}.{name}", f"is set as {_ELSEWHERE[name]}", way_out="move it there")
        elif name not in TUNABLE:
            near = difflib.get_close_matches(str(name), TUNABLE, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(TUNABLE)}"
            self.problem(f"{section}.{name}", "is not a field of a run", way_out=hint)
        return name in TUNABLE

    def fits(self, section: str, name: str, value: Any) -> bool:
        if problem := RULES[name].problem(value):
            self.problem(f"{section}.{name}", problem, value, _number_hint(value, RULES[name].kind))
        return problem is None

    def search(self, value: Any, train: dict[str, Any]) -> dict[str, Param]:
        if not isinstance(value, dict):
            self.problem("search", "must be a mapping of parameters", value)
            return {}
        params: dict[str, Param] = {}
        for name, described in value.items():
            if not self.tunable("search", name):
                continue
            if name in train:
                self.problem(f"search.{name}", "is fixed under train as well", way_out="remove one of the two")
            if name in SHARED_WITH_BASELINE:
                self.problem(
                    f"search.{name}", "is what all trials share with the baseline", way_out="fix it under train"
                )
            if param := self.param(f"search.{name}", described):
                for sample in param.samples():
                    if not self.fits("search", name, sample):
                        break
                params[name] = param
        return self.in_order_of_conditions(params)

    def param(self, key: str, value: Any) -> Param | None:
        kinds = {"float": FloatParam, "int": IntParam, "categorical": ChoiceParam}
        if not isinstance(value, dict):
            self.problem(key, "must be a mapping such as {type: float, low: 0.1, high: 1.0}", value)
            return None
        if value.get("type") not in tuple(kinds):
            self.problem(f"{key}.type", f"must be one of {', '.join(kinds)}", value.get("type", "nothing"))
            return None
        when = self.when(key, value.get("when", {}))
        kind = kinds[value["type"]]
        before = len(self.problems)
        if kind is ChoiceParam:
            self.mapping(key, value, ("type", "choices", "when"), required=("choices",))
            choices = value.get("choices", [0])
            if not isinstance(choices, list) or not choices or any(isinstance(c, list | dict) for c in choices):
                self.problem(f"{key}.choices", "must be a list of plain values, at least one", choices)
            elif len({(type(c), c) for c in choices}) < len(choices):
                self.problem(f"{key}.choices", "must differ from each other", choices)
            return ChoiceParam(choices=tuple(choices), when=when) if len(self.problems) == before else None
        self.mapping(key, value, ("type", "low", "high", "log", "step", "when"), required=("low", "high"))
        return self.number(key, value, kind, when) if len(self.problems) == before else None

    def number(self, key: str, value: dict[str, Any], kind: type, when: dict[str, tuple[Any, ...]]) -> Param | None:
        number, word = (float, "a number") if kind is FloatParam else (int, "a whole number")
        before = len(self.problems)
        low, high = (self.value(value, bound, number, f"must be {word}", at=f"{key}.") for bound in ("low", "high"))
        log = self.value(value, "log", bool, "must be true or false", False, at=f"{key}.")
        step = self.value(value, "step", number, f"must be {word} above 0", None, lambda v: v > 0, f"{key}.")
        if len(self.problems) > before:
            return None
        if low > high:
            self.problem(key, "low must not be above high", f"low {low:g}, high {high:g}", "swap them")
        if log and low <= 0:
            self.problem(f"{key}.low", "must be above 0 on a log scale", low)
        if log and step is not None:
            self.problem(key, "cannot have both log and step", way_out="remove one")
        elif step is not None and low <= high and not on_grid(high, low, step):
            below = low + math.floor((high - low) / step + 1e-9) * step
            self.problem(
                f"{key}.step", "must divide the range from low to high",
                f"step {step:g} in {low:g} to {high:g}", f"let high be {below:g} or {below + step:g}",
            )  # fmt: skip
        if kind is FloatParam:
            return FloatParam(low=low, high=high, log=log, step=step, when=when)
        return IntParam(low=low, high=high, log=log, step=step or 1, when=when)

    def when(self, key: str, value: Any) -> dict[str, tuple[Any, ...]]:
        if not isinstance(value, dict):
            self.problem(f"{key}.when", "must be a mapping of parameters to values", value)
            return {}
        return {parent: tuple(v) if isinstance(v, list) else (v,) for parent, v in value.items()}

    def in_order_of_conditions(self, params: dict[str, Param]) -> dict[str, Param]:
        for name, param in params.items():
            for parent, values in param.when.items():
                key = f"search.{name}.when.{parent}"
                if not isinstance(params.get(parent), ChoiceParam):
                    self.problem(
                        key, "must name a categorical parameter of this search", way_out=f"search {parent} too"
                    )
                elif not values:
                    self.problem(key, f"must name a choice of {parent}, or it never applies", [], "name some")
                elif wrong := [v for v in values if not params[parent].contains(v)]:
                    self.problem(key, f"must be among the choices of {parent}", wrong[0])
        ordered: dict[str, Param] = {}
        while len(ordered) < len(params):
            free = {
                n: p
                for n, p in params.items()
                if n not in ordered and not (p.when.keys() & params.keys()) - ordered.keys()
            }
            if not free:
                waiting = [name for name in params if name not in ordered]
                self.problem(
                    "search", f"the conditions of {', '.join(waiting)} wait for each other", way_out="break the circle"
                )
                break
            ordered.update(free)
        return ordered

    def objectives(self, value: Any) -> tuple[Objective, Objective | None]:
        """The figure, and the cost if there are two."""
        if not isinstance(value, list):
            return self.objective("objective", value), None
        if len(value) != 2:
            rule = "must be one objective or a list of two, a figure and a cost"
            self.problem("objective", rule, f"a list of {len(value)}", "keep two")
            return Objective(), None
        return self.objective("objective[0]", value[0]), self.cost("objective[1]", value[1])

    def objective(self, key: str, value: Any) -> Objective:
        if not self.mapping(key, value, ("metric", "mode")):
            return Objective()
        metric = value.get("metric", "dice_mean")
        self.known(f"{key}.metric", metric, METRICS)
        if value.get("mode", "max") != "max":
            self.problem(f"{key}.mode", "must be max: every offered metric is better when larger", value["mode"])
        return Objective(metric=str(metric))

    def cost(self, key: str, value: Any) -> Objective | None:
        if not self.mapping(key, value, ("metric", "mode"), required=("metric",)):
            return None
        self.known(f"{key}.metric", metric := value.get("metric", COSTS[0]), COSTS)
        if value.get("mode", "min") != "min":
            self.problem(f"{key}.mode", "must be min: the second objective is a cost", value["mode"])
        return Objective(metric=str(metric), mode="min")

    def known(self, key: str, name: Any, names: tuple[str, ...]) -> None:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else ""
            self.problem(key, f"must be one of {', '.join(names)}", name, hint)

    def constraints(self, value: Any) -> tuple[Constraint, ...]:
        if not isinstance(value, list):
            self.problem("constraints", "must be a list such as [{metric: recall, min: 0.9}]", value)
            return ()
        found: list[Constraint] = []
        for n, described in enumerate(value):
            key = f"constraints[{n}]"
            if not self.mapping(key, described, ("metric", "min", "max"), required=("metric",)):
                continue
            metric = described.get("metric", METRICS[0])
            self.known(f"{key}.metric", metric, CONSTRAINED_METRICS)
            if any(metric == other.metric for other in found):
                self.problem(f"{key}.metric", "must be bounded once", metric, "keep one of the two")
            if ("min" in described) == ("max" in described):
                shown = " and ".join(bound for bound in ("min", "max") if bound in described) or "neither"
                self.problem(key, "must have either min or max", shown, "keep one")
            rule = "must be a number from 0 to 1, as figures are"
            bounds = {
                bound: self.value(described, bound, float, rule, None, lambda v: 0 <= v <= 1, f"{key}.")
                for bound in ("min", "max")
            }
            found.append(Constraint(metric=str(metric), **bounds))
        return tuple(found)

    def labelling(self, value: Any) -> Labelling | None:
        keys = tuple(Labelling.__dataclass_fields__)
        if not self.mapping("labelling", value, keys, required=keys):
            return None
        rule = "must be a number of minutes, 0 or more"
        prices = {key: self.value(value, key, float, rule, None, lambda v: v >= 0, "labelling.") for key in keys}
        if None in prices.values():
            return None
        if not any(prices.values()):
            self.problem("labelling", "must have a price above 0", "0 for a label and for a mask", "set one of them")
        return Labelling(**prices)

    def cross_validation(self, document: dict[str, Any]) -> CrossValidation | None:
        if "cross_validation" not in document:
            return None
        value, key = document["cross_validation"], "cross_validation"
        if not self.mapping(key, value, tuple(CrossValidation.__dataclass_fields__)):
            return None
        nested = self.value(value, "nested", bool, "must be true or false", False, at=f"{key}.")
        least = 3 if nested else 2
        why = ", for a nested one trains without two of them" if nested else ""
        rule = f"must be a whole number from {least} to {_MOST_FOLDS}{why}"
        folds = self.value(value, "folds", int, rule, 5, lambda v: least <= v <= _MOST_FOLDS, f"{key}.")
        if nested and document.get("constraints"):
            self.problem(
                f"{key}.nested", "must be false with constraints: which trials meet them is judged on all folds, so "
                "the choice would have seen the fold that scores it", nested, "leave one of the two out",
            )  # fmt: skip
        return CrossValidation(folds=folds, nested=nested)

    def scheduler(self, value: Any, length_of: str, length: int) -> Scheduler:
        value = {"name": value} if isinstance(value, str) else value
        if not self.mapping("scheduler", value, ("name", "min_epochs", "reduction", "keep", "compare"), ("name",)):
            return Scheduler()
        rule = f"must be one of {', '.join(SCHEDULERS)}"
        name = self.value(value, "name", str, rule, "none", SCHEDULERS.__contains__, "scheduler.")
        rule = f"must be a whole number from 1 to {length_of}, {length}"
        min_epochs = self.value(value, "min_epochs", int, rule, 1, lambda v: 1 <= v <= length, "scheduler.")
        rule = "must be a whole number of at least 2"
        reduction = self.value(value, "reduction", int, rule, 3, lambda v: v >= 2, "scheduler.")
        keep = self.value(value, "keep", int, "must be a whole number of at least 1", 3, lambda v: v >= 1, "scheduler.")
        rule = f"must be one of {', '.join(COMPARED)}"
        compare = self.value(value, "compare", str, rule, "segmentation", COMPARED.__contains__, "scheduler.")
        return Scheduler(name=name, min_epochs=min_epochs, reduction=reduction, keep=keep, compare=compare)

    def budget(self, value: Any) -> Budget:
        if not self.mapping("budget", value, _BUDGET_KEYS):
            return Budget()
        rule = "must be a whole number of at least 1 (the baseline is the first trial)"
        trials = self.value(value, "trials", int, rule, None, lambda v: v >= 1, "budget.")
        limits = {
            key: self.value(value, key, float, "must be a number above 0", None, lambda v: v > 0, "budget.")
            for key in _BUDGET_KEYS[1:]
        }
        if not any(key in value for key in _BUDGET_KEYS[:4]):
            self.problem("budget", f"needs at least one of {', '.join(_BUDGET_KEYS[:4])}", value, "say trials: 20")
        if ("money" in value) != ("price_per_device_hour" in value):
            self.problem("budget", "money and price_per_device_hour go together", list(value), "add the other one")
        return Budget(trials=trials, **limits)

    def repeats(self, value: Any) -> Repeats | None:
        if not self.mapping("repeats", value, ("trainings", "seeds", "hours", "prefer")):
            return None
        rule = "must be a whole number of at least"
        trainings = self.value(value, "trainings", int, f"{rule} 1", None, lambda v: v >= 1, "repeats.")
        seeds = self.value(
            value, "seeds", int, f"{rule} 2, the search's own among them", 5, lambda v: v >= 2, "repeats."
        )
        hours = self.value(value, "hours", float, "must be a number above 0", None, lambda v: v > 0, "repeats.")
        rule = f"must be one of {', '.join(PREFERRED)}"
        prefer = self.value(value, "prefer", str, rule, "best", PREFERRED.__contains__, "repeats.")
        return Repeats(trainings=trainings, seeds=seeds, hours=hours, prefer=prefer)

    def sampler_fits(self, space: Space) -> None:
        """What a sampler cannot draw is refused here, not drawn at random in silence."""
        kinds = {name: type(param) for name, param in space.search.items()}
        found = {
            "conditional": [name for name, param in space.search.items() if param.when],
            "categorical": [name for name, kind in kinds.items() if kind is ChoiceParam],
            "unstepped": [n for n, p in space.search.items() if isinstance(p, FloatParam) and p.step is None],
        }
        cannot = {"gp": ["conditional"], "cmaes": ["conditional", "categorical"], "qmc": ["conditional", "categorical"]}
        for kind in cannot.get(space.sampler, []):
            if found[kind]:
                rule = f"{space.sampler} draws no {kind} parameters"
                self.problem("sampler", rule, ", ".join(found[kind]), "use tpe or random")
        if space.sampler == "cmaes" and len(space.search) < 2:
            self.problem("sampler", "cmaes needs two parameters to search", len(space.search), "use tpe or random")
        if space.sampler == "grid" and found["unstepped"]:
            rule = "grid needs a step for each float"
            self.problem("sampler", rule, ", ".join(found["unstepped"]), "give a step, or choices")
        if space.sampler == "grid" and not found["unstepped"]:
            size = math.prod(len(param.values()) for param in space.search.values())
            if size > _LARGEST_GRID:
                self.problem("sampler", f"grid takes at most {_LARGEST_GRID:,} points", f"{size:,}", "use fewer values")

    def cost_fits(self, space: Space) -> None:
        """What a cost, or constraints, ask of the rest of the space."""
        several = [
            what for what, there in (("two objectives", space.cost), ("constraints", space.constraints)) if there
        ]
        if several and space.sampler == "cmaes":
            rule = f"cmaes knows nothing of {' or '.join(several)}"
            self.problem("sampler", rule, space.sampler, "use tpe or gp")
        if space.cost is None:
            return
        if space.cost.metric in MASK_COSTS and "num_segmented" not in space.search:
            self.problem(
                "objective[1].metric", "num_segmented must be searched, or every trial costs the same",
                "nothing of that name under search", "search num_segmented, or keep one objective",
            )  # fmt: skip
        if space.cost.metric == "device_seconds" and space.scheduler.name != "none":
            self.problem(
                "scheduler", "must be none where device_seconds is an objective: at a rung the quick and slightly "
                "worse ones, which belong on the front, would be cut", space.scheduler.name, "say scheduler: none",
            )  # fmt: skip

    def labelling_fits(self, space: Space, is_said: bool) -> None:
        """Prices and the costs that have a use for them go together."""
        cost = space.cost.metric if space.cost else None
        if cost in MASK_COSTS and space.cross_validation:
            self.problem(
                "cross_validation", f"must be absent where {cost} is an objective: each fold trains with other masks",
                space.cross_validation.folds, "leave one of the two out",
            )  # fmt: skip
        if cost == "labelling_minutes" and not is_said:
            self.problem(
                "labelling", "must say what a label and a mask take where labelling_minutes is an objective",
                "no prices", "add labelling: {minutes_per_label: 0.05, minutes_per_mask: 2.0}, with your own minutes",
            )  # fmt: skip
        if cost == "labelling_minutes" and space.labelling and not space.labelling.minutes_per_mask:
            self.problem(
                "labelling.minutes_per_mask", "must be above 0 where labelling_minutes is an objective, or every trial "
                "costs the same", 0, "set it",
            )  # fmt: skip
        if is_said and cost not in MASK_COSTS:
            self.problem(
                "labelling", f"belongs to an objective of {' or '.join(MASK_COSTS)}", cost or "one objective",
                "add objective: [{metric: dice_mean}, {metric: labelling_minutes}], or remove it",
            )  # fmt: skip

    def scheduler_fits(self, space: Space, length_of: str, length: int) -> None:
        """A scheduler that would compare nothing is refused."""
        scheduler, trials = space.scheduler, space.budget.trials
        if scheduler.name != "none" and scheduler.min_epochs >= length:
            rule = f"must be less than {length_of}, {length}: after the last {space.unit} nothing is left to stop"
            self.problem("scheduler.min_epochs", rule, scheduler.min_epochs, "lower it, or say scheduler: none")
        if scheduler.name == "top_k" and (trials is None or trials <= scheduler.keep):
            rule = f"top_k must be given more trials than it keeps, {scheduler.keep}"
            found = "a budget without trials" if trials is None else trials
            self.problem("scheduler", rule, found, "raise budget.trials in the space")

    def repeats_fit(self, space: Space) -> None:
        """Whoever limits money wants to know what comes after the search."""
        limits = [name for name in ("device_hours", "money") if getattr(space.budget, name) is not None]
        repeats = space.repeats
        if limits and repeats and repeats.trainings is None and repeats.hours is None:
            self.problem(
                "repeats", f"must say trainings or hours where the budget limits {' and '.join(limits)}, in which "
                "repeats do not count", "neither", "add repeats.trainings",
            )  # fmt: skip

    def late_decision(self, space: Space) -> None:
        """A rung compares nothing that has not begun to learn. A fold is trained to its end before it is compared."""
        if space.cross_validation:
            return

        def may_be(name: str) -> bool:
            return bool(space.train.get(name, DEFAULTS[name])) or name in space.search

        decides = space.objective.metric in DECISION_METRICS or may_be("blacken")
        scheduler = space.scheduler
        if scheduler.name != "none" and scheduler.compare == "objective" and decides and may_be("dynamic_balance"):
            self.problem(
                "scheduler.compare", "must be segmentation for an objective that depends on the decision, with "
                "dynamic_balance: the decision learns late, so early epochs say nothing of it", scheduler.compare,
                "or set train.dynamic_balance: false",
            )  # fmt: skip

    def start_from(self, space: Space, value: Any) -> tuple[dict[str, Any], ...]:
        """Points to begin with; judged only against a search that is right itself."""
        if not isinstance(value, list) or not all(isinstance(point, dict) for point in value):
            self.problem("start_from", "must be a list of configurations, each a mapping of parameters", value)
            return ()
        if any(problem.startswith("search") for problem in self.problems):
            return ()
        for n, point in enumerate(value):
            self.point(space, f"start_from[{n}]", point)
        return tuple(value)

    def point(self, space: Space, key: str, point: dict[str, Any]) -> None:
        active = space.active(point)
        for name in active:
            param = space.search[name]
            if name not in point:
                self.problem(
                    f"{key}.{name}", "is missing", way_out="each searched parameter that applies needs a value"
                )
            elif not param.contains(point[name]):
                kind = {FloatParam: float, IntParam: int}.get(type(param), object)
                self.problem(f"{key}.{name}", range_in_words(param), point[name], _number_hint(point[name], kind))
        for name in point:
            if name in space.search and name not in active:
                when = ", ".join(
                    f"{parent} {' or '.join(map(str, v))}" for parent, v in space.search[name].when.items()
                )
                self.problem(f"{key}.{name}", f"applies only with {when}", point[name], "remove it")
            elif name not in space.search:
                near = difflib.get_close_matches(str(name), space.search, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"the searched ones are {', '.join(space.search)}"
                self.problem(f"{key}.{name}", "is not a searched parameter", way_out=hint)

    def corners(self, space: Space) -> None:
        """What fields ask of each other: at both ends of the search, and with each value of each parameter, where the
        conditions of that one are met."""
        for corner in (0, -1):
            ends: dict[str, Any] = {name: param.samples()[corner] for name, param in space.search.items()}
            if not self.config_fits(space, ends):
                return
            for name, param in space.search.items():
                conditions = _conditions(space, name)
                if conditions is None:
                    rule = "can never be met: what it names has conditions of its own that exclude it"
                    self.problem(f"search.{name}.when", rule, {k: list(v) for k, v in param.when.items()})
                    return
                met = {parent: values[corner] for parent, values in conditions.items()}
                if not all(self.config_fits(space, ends | met | {name: value}) for value in param.samples()):
                    return

    def config_fits(self, space: Space, params: dict[str, Any]) -> bool:
        """Whether the parameters that apply make a configuration; those that do not are blamed, or what is fixed."""
        for section, chosen in (("train", {}), ("search", {name: params[name] for name in space.active(params)})):
            try:
                space.config(chosen, space.seed)
            except ValueError as error:
                self.problem(section, str(error))
                return False
        return True


def _conditions(space: Space, name: str) -> dict[str, tuple[Any, ...]] | None:
    """Which values the parameters that a parameter depends on must have, directly or not; None if there are none."""
    found: dict[str, tuple[Any, ...]] = {}
    for other, param in reversed([*space.search.items()]):  # those that are named stand before
        if other == name or other in found:
            for parent, values in param.when.items():
                found[parent] = tuple(value for value in found.get(parent, values) if value in values)
    return found if all(found.values()) else None


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a search-space file. Rules between keys are checked by `load` alone."""

    def bounds(kind: str) -> dict[str, Any]:
        number = {"type": kind}
        return {"low": number, "high": number, "log": {"type": "boolean"}, "step": number | {"exclusiveMinimum": 0}}

    when = {"when": {"type": "object", "description": "searched only where these parameters have these values"}}

    def parameter(kind: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
        properties = {"type": {"const": kind}, **properties, **when}
        return {
            "type": "object",
            "properties": properties,
            "required": ["type", *required],
            "additionalProperties": False,
        }

    param = {
        "oneOf": [
            parameter("float", bounds("number"), ["low", "high"]),
            parameter("int", bounds("integer"), ["low", "high"]),
            parameter("categorical", {"choices": {"type": "array", "minItems": 1, "uniqueItems": True}}, ["choices"]),
        ]
    }  # fmt: skip
    positive = {"type": "number", "exclusiveMinimum": 0}
    side = {"type": "integer", "minimum": 8, "multipleOf": 8, "description": "px"}
    share = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}

    def mapping(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}

    figure = mapping({"metric": {"enum": list(METRICS)}, "mode": {"const": "max"}})
    cost = mapping({"metric": {"enum": list(COSTS)}, "mode": {"const": "min"}}, ("metric",))
    both = {"type": "array", "prefixItems": [figure, cost], "minItems": 2, "items": False}
    limit = {"type": "number", "minimum": 0, "maximum": 1, "description": "inclusive, on validation"}
    bound = mapping({"metric": {"enum": list(CONSTRAINED_METRICS)}, "min": limit, "max": limit}, ("metric",))
    prices = tuple(Labelling.__dataclass_fields__)
    minutes = {"type": "number", "minimum": 0, "description": "minutes of a person; one of the two is above 0"}
    scheduler = {
        "name": {"enum": list(SCHEDULERS)},
        "min_epochs": {"type": "integer", "minimum": 1},
        "reduction": {"type": "integer", "minimum": 2},
        "keep": {"type": "integer", "minimum": 1},
        "compare": {"enum": list(COMPARED)},
    }
    properties = {
        "name": {"type": "string", "pattern": f"^[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}$"},
        "data": mapping(
            {"layout": {"enum": list(LAYOUTS)}, "height": side, "width": side}
            | {"validation_share": share, "test_share": share}
        ),
        "train": mapping({name: _field_schema(name) for name in TUNABLE}),
        "search": mapping({name: param | {"description": RULES[name].doc} for name in TUNABLE}),
        "objective": {"anyOf": [figure, both]},
        "constraints": {"type": "array", "items": bound | {"oneOf": [{"required": ["min"]}, {"required": ["max"]}]}},
        "labelling": mapping(dict.fromkeys(prices, minutes), prices),
        "cross_validation": mapping(
            {"folds": {"type": "integer", "minimum": 2, "maximum": _MOST_FOLDS}, "nested": {"type": "boolean"}}
        ),
        "sampler": {"enum": list(SAMPLERS)},
        "scheduler": {"anyOf": [{"enum": list(SCHEDULERS)}, mapping(scheduler, ("name",))]},
        "budget": mapping({"trials": {"type": "integer", "minimum": 1}, **dict.fromkeys(_BUDGET_KEYS[1:], positive)}),
        "repeats": mapping(
            {"trainings": {"type": "integer", "minimum": 1}, "seeds": {"type": "integer", "minimum": 2}}
            | {"hours": positive, "prefer": {"enum": list(PREFERRED)}}
        ),
        "start_from": {"type": "array", "items": {"type": "object"}},
        "seed": {"type": "integer", "minimum": 0, "maximum": RULES["seed"].high},
    }  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "segdec-tuner search space"} | mapping(
        properties, _REQUIRED_KEYS
    )


def _field_schema(name: str) -> dict[str, Any]:
    rule = RULES[name]
    if rule.choices:
        described: dict[str, Any] = {"enum": list(rule.choices)}
    elif rule.kind is bool:
        described = {"type": "boolean"}
    else:
        described = {"type": "number" if rule.kind is float else "integer"}
        if rule.low is not None:
            described["minimum"] = rule.low
        if rule.high is not None:
            described["maximum"] = rule.high
        if rule.or_word:
            described = {"anyOf": [described, {"const": rule.or_word}]}
    return described | {"description": rule.doc, "default": DEFAULTS[name]}


def range_in_words(param: Param) -> str:
    """The rule of a value, in words."""
    if isinstance(param, ChoiceParam):
        return f"must be one of {', '.join(map(str, param.choices))}"
    word = "a number" if isinstance(param, FloatParam) else "a whole number"
    steps = (
        ""
        if param.step is None or (param.step == 1 and isinstance(param, IntParam))
        else f" in steps of {param.step:g}"
    )
    return f"must be {word} from {param.low:g} to {param.high:g}{steps}"


def _number_hint(value: object, kind: type) -> str:
    """YAML reads 1e-3 as text, and 10.0 as no whole number."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number) or kind in (bool, str):
        return ""
    if kind is int:
        return f"write {number:.0f}" if number.is_integer() else ""
    return f"YAML takes this for text; write {number!r}" if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) or " " not in value else value
    return text if len(text) <= 80 else text[:77] + "..."
