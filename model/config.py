"""RunConfig: everything that decides how one network is trained and judged, with ranges and units.

Each field carries its own rule, so that the search-space reader, the JSON schema and RunConfig itself apply the
same one. [1] and [2] are the papers in REFERENCES.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REFERENCES = (
    "[1] Božič, Tabernik, Skočaj: Mixed supervision for surface-defect detection: from weakly to fully supervised "
    "learning. Computers in Industry 129, 2021.",
    "[2] Tabernik, Šuc, Skočaj: Automated detection and segmentation of cracks in concrete surfaces using joined "
    "segmentation and classification deep neural network. Construction and Building Materials 408, 2023.",
)
"""The papers that the docstrings of this package cite: SegDecNet and SegDecNet++."""

ARCHITECTURES = ("segdecnet", "segdecnet_decoder", "segdecnet_plusplus")
THRESHOLD_RULES = ("min_of_max", "pr_curve", "grid")

JUDGING_FIELDS = ("threshold_rule", "threshold_factor", "blacken", "lower_threshold", "best_by")
"""Fields that decide how a training is judged and not how it goes: each trained network can replay them."""

STRIDE = 8
"""px of the input for each position of the trunk's last map, in each direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What values a field takes. `low` and `high` are inclusive; an int is accepted where a float is wanted."""

    kind: type
    low: float | None = None
    high: float | None = None
    odd: bool = False
    choices: tuple[str, ...] = ()
    or_word: str | None = None
    doc: str

    def problem(self, value: object) -> str | None:
        """The rule in words if `value` breaks it ("must be ..."), else None."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.or_word is not None and value == self.or_word:
            return None
        if self.kind is bool:
            return None if isinstance(value, bool) else "must be true or false"
        ok = isinstance(value, int) or (self.kind is float and isinstance(value, float) and math.isfinite(value))
        if not ok or isinstance(value, bool):
            return "must be " + self._wanted()
        assert isinstance(value, int | float)
        outside = (self.low is not None and value < self.low) or (self.high is not None and value > self.high)
        if outside or (self.odd and value % 2 == 0):
            return "must be " + self._wanted()
        return None

    def _wanted(self) -> str:
        name = "a number" if self.kind is float else "an odd whole number" if self.odd else "a whole number"
        if self.low is not None and self.high is not None:
            name += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            name += f" of at least {self.low:g}"
        return name + (f" or the word '{self.or_word}'" if self.or_word else "")


def _field(default: Any, kind: type, doc: str, **rule: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(kind=kind, doc=doc, **rule)})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One training and how it is judged. Raises ValueError that names every field out of its range."""

    architecture: str = _field(
        "segdecnet_decoder", str, "the network: [1], its decoder variant, or [2]", choices=ARCHITECTURES
    )
    width: float = _field(1.0, float, "factor on the channel counts; 1.0 is the published network", low=0.05, high=4)
    norm: str = _field(
        "root_std",
        str,
        "what FeatureNorm divides by: the root of the standard deviation as in the public code, or (standard) the "
        "standard deviation",
        choices=("root_std", "standard"),
    )
    input_height: int = _field(448, int, "height of the network's input, px", low=STRIDE)
    input_width: int = _field(448, int, "width of the network's input, px", low=STRIDE)
    epochs: int = _field(50, int, "length of the full loss schedule, epochs", low=1, high=10_000)
    batch_size: int = _field(1, int, "images a step; the loss is their mean", low=1, high=4096)
    micro_batch: int = _field(
        0, int, "images at a time on the device, gradients added up to a batch; 0 is the whole batch", low=0, high=4096
    )
    optimizer: str = _field("sgd", str, "sgd without momentum, as published, or adam", choices=("sgd", "adam"))
    learning_rate: float = _field(1.0, float, "step size", low=1e-8, high=100)
    schedule: str = _field(
        "constant", str, "of the learning rate over the epochs", choices=("constant", "step", "cosine")
    )
    schedule_step: int = _field(10, int, "schedule step: epochs between two cuts", low=1, high=10_000)
    schedule_gamma: float = _field(0.9, float, "schedule step: factor of a cut", low=0, high=1)
    delta_cls_loss: float = _field(
        0.01, float, "delta: weight of the decision loss, [1] 'End-to-end learning', equation 1", low=0, high=1000
    )
    dynamic_balance: bool = _field(
        True, bool, "lambda falls from 1 to 1/epochs: segmentation first, decision later, [1]"
    )
    gradient_adjustment: bool = _field(True, bool, "the decision loss does not reach the segmentation network, [1]")
    frequency_sampling: bool = _field(True, bool, "negatives that were used less are drawn more often, [1]")
    weighted_loss: bool = _field(False, bool, "weight positive pixels by their distance to the edge, [1]")
    weight_power: float = _field(2.0, float, "p of [1]", low=0, high=16)
    weight_maximum: float = _field(1.0, float, "largest pixel weight, of [1]", low=0, high=1000)
    weight_per: str = _field(
        "image",
        str,
        "what the largest distance is taken over: the image as in [1], or each connected component",
        choices=("image", "component"),
    )
    pixel_positive_weight: float | str = _field(
        1.0,
        float,
        "factor on the loss of defect pixels [2]; balanced is sound over defect pixels of the training masks",
        low=0,
        high=10_000,
        or_word="balanced",
    )
    image_positive_weight: float | str = _field(
        1.0,
        float,
        "factor on the decision loss of positive images [2]; balanced is negative over positive training images",
        low=0,
        high=10_000,
        or_word="balanced",
    )
    hard_mining_places: int = _field(
        0, int, "places added to each batch for images that were hard last time [2]; 0 is off", low=0, high=4096
    )
    hard_mining_share: float = _field(
        0.1, float, "the hard images are at least this share of all, by whole standard deviations", low=0, high=1
    )
    hard_mining_score: str = _field(
        "loss",
        str,
        "what makes an image hard: its segmentation loss; the same times 2 false alarms + misses + 1 (errors); "
        "the distance of its largest probability from its decision (disagreement)",
        choices=("loss", "errors", "disagreement"),
    )
    dilate: int = _field(
        1, int, "side of the square that widens the training masks, px of the original", low=1, high=99, odd=True
    )
    num_segmented: int | str = _field(
        "all", int, "how many positive training images keep their masks", low=0, or_word="all"
    )
    augment_flips: bool = _field(False, bool, "random horizontal and vertical flips")
    augment_quarter_turns: bool = _field(False, bool, "random quarter turns; the input must be square")
    augment_brightness: float = _field(
        0.0, float, "largest random change of brightness and contrast, as a share", low=0, high=1
    )
    augment_color: float = _field(0.0, float, "largest random change of hue and saturation, as a share", low=0, high=1)
    best_by: str = _field(
        "objective",
        str,
        "which epoch is kept: best by the search's objective, by the decision's F measure, by mean Dice "
        "(segmentation), or at least as good as all before in both",
        choices=("objective", "decision", "segmentation", "both"),
    )
    blacken: bool = _field(False, bool, "an image that is decided negative has an empty mask [2]")
    lower_threshold: float = _field(
        1.0,
        float,
        "factor on the threshold (a probability), once, where an image is decided positive but its mask is empty; "
        "0.9 in [2], 1 is off",
        low=0.01,
        high=1,
    )
    threshold_rule: str = _field(
        "pr_curve", str, "how the segmentation threshold is chosen on validation", choices=THRESHOLD_RULES
    )
    threshold_factor: int = _field(1, int, "rule pr_curve looks at every n-th pixel of the split", low=1, high=100)
    precision: str = _field(
        "auto", str, "auto is bfloat16 where the device computes in it", choices=("auto", "float32", "bfloat16")
    )
    cuda_graphs: bool = _field(
        True,
        bool,
        "record a training step on CUDA and play it back; false runs its kernels one by one, to the same end",
    )
    seed: int = _field(0, int, "fixes initial weights, order and augmentation", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        problems = [
            f"{name} {problem}, found {getattr(self, name)!r}"
            for name, rule in RULES.items()
            if (problem := rule.problem(getattr(self, name)))
        ]
        if size_problem := input_size_problem(self.input_height, self.input_width):
            problems.append(size_problem)
        if self.augment_quarter_turns and self.input_height != self.input_width:
            problems.append(
                f"augment_quarter_turns needs a square input, found {self.input_height}x{self.input_width}; "
                "use augment_flips"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML; `from_dict` takes them back."""
        return {name: getattr(self, name) for name in RULES}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`. Raises ValueError for a key that is no field."""
        if unknown := [name for name in values if name not in RULES]:
            raise ValueError("; ".join(unknown_field(name) for name in unknown))
        return cls(**values)

    def training_fields(self) -> dict[str, Any]:
        """The fields that decide the weights of each epoch."""
        return {name: getattr(self, name) for name in RULES if name not in JUDGING_FIELDS}

    def judgement(self) -> Judgement:
        """The other fields: how a training is judged."""
        return Judgement.of({name: getattr(self, name) for name in JUDGING_FIELDS})


class Judgement(NamedTuple):
    """JUDGING_FIELDS of a RunConfig. The factor of a rule that has none is 1, so that equal judgements are equal."""

    threshold_rule: str
    threshold_factor: int
    blacken: bool
    lower_threshold: float
    best_by: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Judgement:
        """From JUDGING_FIELDS."""
        found = cls(**{name: values[name] for name in JUDGING_FIELDS})
        found = found._replace(lower_threshold=round(found.lower_threshold, 9))  # 0.3 + 6 * 0.1 is 0.9
        return found if found.threshold_rule == "pr_curve" else found._replace(threshold_factor=1)

    @property
    def rule(self) -> str:
        """The threshold rule and its factor under the one name that records use."""
        return rule_name(self.threshold_rule, self.threshold_factor)


RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in dataclasses.fields(RunConfig)}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RunConfig)}


def rule_name(rule: str, factor: int) -> str:
    """A threshold rule and its factor under the one name that records use."""
    return f"{rule}/{factor}" if rule == "pr_curve" else rule


def unknown_field(name: str) -> str:
    """A message for a key that is no field of RunConfig, with the nearest one if there is any."""
    near = difflib.get_close_matches(name, RULES, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(RULES)}"
    return f"'{name}' is not a field of a run; {hint}"


def input_size_problem(height: int, width: int) -> str | None:
    """Why the networks cannot take `height` x `width` px, with the way out; None if they can.

    The trunk halves the input three times and the decision branch three times more (floor division). FeatureNorm's
    standard deviation needs at least two positions in the smallest map.
    """
    if height % STRIDE or width % STRIDE:
        up = [math.ceil(side / STRIDE) * STRIDE for side in (height, width)]
        return (
            f"input height and width must be multiples of {STRIDE} px (the trunk's stride), "
            f"found {height}x{width}; use {up[0]}x{up[1]}"
        )
    smallest = (height // STRIDE // 8) * (width // STRIDE // 8)
    if smallest < 2:
        return (
            f"the decision branch's last map (1/64 of the input) must hold at least 2 positions, found {smallest} "
            f"for {height}x{width} px; use at least 128x64"
        )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """A trial is so many trainings, each judged on images that it was not given."""

    folds: int = 5
    nested: bool = False
    """each training leaves out two folds: one that chooses epoch and thresholds, one that is only scored"""
