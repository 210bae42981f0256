"""What a search is: frozen, plain objects. tuner/space_file.py reads and validates them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.config import DEFAULTS, JUDGING_FIELDS, CrossValidation, RunConfig

COMPARED = ("segmentation", "objective")
SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
SCHEDULERS = ("asha", "hyperband", "median", "top_k", "none")
SEGMENTATION_METRICS = (
    "dice_mean", "dice_positive_mean", "iou_mean", "iou_positive_mean", "precision", "recall", "f1", "iou_pooled",
    "two_pixel_f1", "tolerance_f1",
)  # fmt: skip
DECISION_METRICS = ("decision_ap", "decision_auc")
METRICS = SEGMENTATION_METRICS + DECISION_METRICS
COSTS = ("num_segmented", "labelling_minutes", "device_seconds")
"""What may be minimised beside a figure: how many positive training images keep their masks; the minutes that drawing
them and labelling the training images takes; what a training took."""
MASK_COSTS = ("num_segmented", "labelling_minutes")
"""those that `num_segmented` decides"""
CONSTRAINED_DECISION_METRICS = (
    *DECISION_METRICS, "decision_accuracy", "decision_precision", "decision_recall", "decision_specificity",
    "decision_f1",
)  # fmt: skip
CONSTRAINED_METRICS = (
    *SEGMENTATION_METRICS, "precision_mean", "recall_mean", "dice_std", "iou_std", "f1_positive",
    "iou_pooled_positive", "iou_two_class", *CONSTRAINED_DECISION_METRICS,
)  # fmt: skip
"""Figures of an epoch on validation that may be bounded; each lies between 0 and 1."""

SHARED_WITH_BASELINE = ("width", "epochs", "batch_size", "micro_batch", "precision", "cuda_graphs")
"""What the baseline takes over from a space, besides data and input size; so these cannot be searched."""

BASELINE = {name: value for name, value in DEFAULTS.items() if name not in SHARED_WITH_BASELINE} | {
    "architecture": "segdecnet_decoder", "optimizer": "sgd", "learning_rate": 1.0, "delta_cls_loss": 0.01,
    "dilate": 1, "dynamic_balance": True, "gradient_adjustment": True, "frequency_sampling": True,
    "weighted_loss": False, "num_segmented": "all", "threshold_rule": "pr_curve", "threshold_factor": 1,
}  # fmt: skip
"""The method of the results page: what it states, and the default, which is off, of all that came later."""


LONGEST_NAME = 100
NAME_RULE = f"letters, digits, - and _, at most {LONGEST_NAME}"

_MOST_REPLAYED = 20
"""values of one field; with more, each is trained for"""


class SpaceError(ValueError):
    """A search space that cannot be used: one line a problem, with key, rule, value found and way out."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n  ".join([f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}:", *problems]))


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatParam:
    """A number from `low` to `high`, both inclusive; on a log scale, or in steps from `low`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def contains(self, value: object) -> bool:
        return is_number(value) and self.low <= float(value) <= self.high and on_grid(value, self.low, self.step)  # type: ignore[arg-type]

    def samples(self) -> tuple[Any, ...]:
        """Values that show whether a field accepts the whole range."""
        return (self.low, self.high) if self.step is None else (self.low, self.low + self.step, self.high)

    def values(self) -> tuple[float, ...]:
        """All of them; there must be a step."""
        assert self.step is not None
        count = round((self.high - self.low) / self.step) + 1
        return tuple(min(self.low + n * self.step, self.high) for n in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class IntParam:
    """A whole number from `low` to `high`, both inclusive; on a log scale, or in steps from `low`."""

    low: int
    high: int
    log: bool = False
    step: int = 1
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def contains(self, value: object) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.low <= value <= self.high and (value - self.low) % self.step == 0  # type: ignore[operator]

    def samples(self) -> tuple[Any, ...]:
        """Values that show whether a field accepts the whole range."""
        return (self.low, min(self.low + self.step, self.high), self.high)

    def values(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(range(self.low, self.high + 1, self.step))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceParam:
    """One of some plain values."""

    choices: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def contains(self, value: object) -> bool:
        return any(value == choice and type(value) is type(choice) for choice in self.choices)

    def samples(self) -> tuple[Any, ...]:
        """Values that show whether a field accepts all choices."""
        return self.choices

    def values(self) -> tuple[Any, ...]:
        """All of them."""
        return self.choices


Param = FloatParam | IntParam | ChoiceParam


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What the trials see of a data set; its path comes from the command line."""

    layout: str = "auto"
    height: int = 448
    """px of the network's input"""
    width: int = 448
    """px of the network's input"""
    validation_share: float = 0.15
    test_share: float = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is searched for: a figure on validation, better when larger, or one of COSTS, better when smaller."""

    metric: str = "dice_mean"
    mode: str = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A bound, inclusive, on a validation figure of the epoch whose weights are kept; one of `min` and `max` is set."""

    metric: str
    min: float | None = None
    max: float | None = None

    def excess(self, value: float | None) -> float:
        """How far a figure lies beyond the bound; 0 or less where it meets it. One that does not exist lies as far
        beyond as figures reach, 1."""
        if value is None:
            return 1.0
        return self.min - value if self.min is not None else value - (self.max or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelling:
    """What it takes to prepare a training set by hand."""

    minutes_per_label: float
    """to say of an image whether it has a defect"""
    minutes_per_mask: float
    """to draw the mask of a positive; a negative needs none"""

    def minutes(self, images: int, masks: int) -> float:
        """Of so many labelled images, positives and negatives, of which so many have a mask that was drawn."""
        return images * self.minutes_per_label + masks * self.minutes_per_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """When trials are compared and stopped (tuner/schedulers.py).

    `asha` and `hyperband` compare at epochs min_epochs * reduction^k and let the best 1/reduction go on; `median` at
    every epoch from min_epochs on; `top_k` holds all trials of the budget at min_epochs and lets the best `keep` go on
    (Egele et al., 2023, with one epoch: arXiv 2307.15422).
    """

    name: str = "none"
    min_epochs: int = 1
    reduction: int = 3
    keep: int = 3
    compare: str = "segmentation"
    """what is compared. With dynamic balance the decision branch learns late, and a trial at a rung is on the loss
    schedule of its whole length: so by default only the masks, as they are without blackening, by the objective if it
    is one of segmentation, else by mean Dice. `objective` is the objective itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a search may spend; it ends at the first limit reached. None is no limit."""

    trials: int | None = None
    hours: float | None = None
    device_hours: float | None = None
    money: float | None = None
    price_per_device_hour: float | None = None


PREFERRED = ("best", "cheapest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Trainings of the search's best configurations with further seeds, after the search (tuner/race.py)."""

    trainings: int | None = None
    """how many there may be; None is half as many as networks were trained to the end"""
    seeds: int = 5
    """trainings of one configuration at most, the search's own among them"""
    hours: float | None = None
    """how long they may take"""
    prefer: str = "best"
    """best: the configuration with the best mean over seeds. cheapest: of those that cannot be told from it, the one
    that costs least, by the second objective if there is one, else by the time of its training"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A search space. `search` is ordered: a parameter stands after those that its `when` names."""

    name: str
    data: DataOptions
    train: Mapping[str, Any]
    search: Mapping[str, Param]
    objective: Objective
    """the figure; what wins, where there is a cost beside it too"""
    sampler: str
    scheduler: Scheduler
    budget: Budget
    start_from: tuple[Mapping[str, Any], ...]
    seed: int
    cost: Objective | None = None
    """the second objective, one of COSTS"""
    constraints: tuple[Constraint, ...] = ()
    """at most one a figure"""
    repeats: Repeats | None = None
    """None: the winner is the best of single trainings"""
    labelling: Labelling | None = None
    """the price of labels and masks; known wherever labelling_minutes is the cost"""
    cross_validation: CrossValidation | None = None
    """a trial is a training a fold (tuner/folds.py); else one training"""

    @property
    def trial_length(self) -> int:
        """How many reports a whole trial makes, in the units that schedulers compare: one an epoch, or one a fold."""
        if self.cross_validation:
            return self.cross_validation.folds
        return int(self.train.get("epochs", DEFAULTS["epochs"]))

    @property
    def unit(self) -> str:
        """What a trial reports one of."""
        return "fold" if self.cross_validation else "epoch"

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The figure, and the cost if there is one."""
        return (self.objective, self.cost) if self.cost else (self.objective,)

    @property
    def compares_objective(self) -> bool:
        """Whether what a scheduler compares is the objective itself, and not the masks in its place."""
        if self.scheduler.compare == "objective":
            return True
        judged = ("blacken", "lower_threshold")
        plain = all(
            name not in self.search and self.train.get(name, DEFAULTS[name]) == DEFAULTS[name] for name in judged
        )
        return plain and self.objective.metric not in DECISION_METRICS

    def active(self, params: Mapping[str, Any]) -> list[str]:
        """The parameters whose conditions `params` meets."""
        names: list[str] = []
        for name, param in self.search.items():
            if all(parent in names and params.get(parent) in values for parent, values in param.when.items()):
                names.append(name)
        return names

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether `params` is a whole point of the space: each active parameter in range, and no other."""
        active = self.active(params)
        return set(active) == set(params) and all(self.search[name].contains(params[name]) for name in active)

    def config(self, params: Mapping[str, Any], seed: int) -> RunConfig:
        """The one binding of names to fields: fixed values, searched values, input size and seed."""
        size = {"input_height": self.data.height, "input_width": self.data.width}
        return RunConfig(**{**self.train, **params, **size, "seed": seed})

    def baseline_config(self, seed: int) -> RunConfig:
        """The results page's method on this space's data, size, width, epochs, batch and precision."""
        own = {name: value for name, value in self.train.items() if name in SHARED_WITH_BASELINE}
        size = {"input_height": self.data.height, "input_width": self.data.width}
        return RunConfig(**{**own, **BASELINE, **size, "seed": seed})

    def baseline_params(self) -> dict[str, Any] | None:
        """The baseline as a point of the space, or None where it lies outside."""
        baseline = self.baseline_config(self.seed)
        params = {name: getattr(baseline, name) for name in self.search}
        params = {name: params[name] for name in self.active(params)}
        if not self.contains(params):
            return None
        return params if self.config(params, baseline.seed) == baseline else None

    def replayed_values(self) -> dict[str, tuple[Any, ...]]:
        """For each field that judges a trained network, the values that this space may propose, where they are few
        enough to try all on every network."""
        found = {}
        for name in JUDGING_FIELDS:
            if param := self.search.get(name):
                values = () if isinstance(param, FloatParam) and param.step is None else param.values()
                if param.when:  # where it does not apply, the fixed value does
                    values = (*values, self.train.get(name, DEFAULTS[name]))
                if 0 < len(values) <= _MOST_REPLAYED:
                    found[name] = values
        return found

    def grid(self) -> list[dict[str, Any]]:
        """Every point once; each parameter must have a countable range."""
        points: list[dict[str, Any]] = [{}]
        for name, param in self.search.items():
            assert not (isinstance(param, FloatParam) and param.step is None)
            applies = [all(point.get(parent) in values for parent, values in param.when.items()) for point in points]
            points = [
                point | ({name: value} if here else {})
                for point, here in zip(points, applies, strict=True)
                for value in (param.values() if here else (None,))
            ]
        return points

    def to_dict(self) -> dict[str, Any]:
        """As in its YAML file, with every default written out; `parse` takes it back."""
        objectives = [fields_of(objective) for objective in self.objectives]
        bounds = [{k: v for k, v in fields_of(one).items() if v is not None} for one in self.constraints]
        return {
            "name": self.name,
            "data": fields_of(self.data),
            "train": dict(self.train),
            "search": {name: _param_dict(param) for name, param in self.search.items()},
            "objective": objectives if self.cost else objectives[0],
            **({"constraints": bounds} if bounds else {}),
            **({"labelling": fields_of(self.labelling)} if self.labelling else {}),
            **({"cross_validation": fields_of(self.cross_validation)} if self.cross_validation else {}),
            "sampler": self.sampler,
            "scheduler": fields_of(self.scheduler) if self.scheduler.name != "none" else "none",
            "budget": {key: value for key, value in fields_of(self.budget).items() if value is not None},
            **(
                {"repeats": {k: v for k, v in fields_of(self.repeats).items() if v is not None}} if self.repeats else {}
            ),
            "start_from": [dict(point) for point in self.start_from],
            "seed": self.seed,
        }

    def fingerprint(self) -> str:
        """Names what is searched: equal spaces may share a study, whatever they are allowed to spend."""
        return fingerprint_of(self.to_dict())


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """The fingerprint of a space that `Space.to_dict` described, maybe in another version with other defaults."""
    names = ("data", "train", "search", "objective", "constraints", "cross_validation", "seed")
    described = {k: v for k, v in document.items() if k in names}
    objective = document.get("objective")
    if isinstance(objective, list) and objective[-1]["metric"] == "labelling_minutes":
        described["labelling"] = document["labelling"]  # prices are a part of what is minimised
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def is_number(value: object) -> bool:
    """A finite int or float; a bool is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_name(value: str) -> bool:
    """Whether a word is safe as the name of a folder: NAME_RULE."""
    return 0 < len(value) <= LONGEST_NAME and all(c.isascii() and (c.isalnum() or c in "-_") for c in value)


def on_grid(value: Any, low: float, step: float | None) -> bool:
    """Whether whole steps lead from `low` to `value`, within rounding."""
    return step is None or abs((value - low) / step - round((value - low) / step)) < 1e-6


def fields_of(value: Any) -> dict[str, Any]:
    """A value object's fields, one level deep."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _param_dict(param: Param) -> dict[str, Any]:
    kind = {FloatParam: "float", IntParam: "int", ChoiceParam: "categorical"}[type(param)]
    values = {
        key: value
        for key, value in fields_of(param).items()
        if value is not None and value is not False and value != {}
    }
    if "choices" in values:
        values["choices"] = list(values["choices"])
    if "when" in values:
        values["when"] = {k: list(v) for k, v in values["when"].items()}
    return {"type": kind, **values}
