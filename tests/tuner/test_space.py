import copy
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tuner import space_file
from tuner.space import COSTS, MASK_COSTS, Constraint, FloatParam, IntParam, Labelling, Objective, SpaceError

GOOD = {
    "name": "good",
    "data": {"height": 128, "width": 128},
    "train": {"epochs": 4, "width": 0.25},
    "search": {
        "learning_rate": {"type": "float", "low": 0.001, "high": 1.0, "log": True},
        "dilate": {"type": "int", "low": 1, "high": 7, "step": 2},
        "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
        "threshold_factor": {"type": "int", "low": 1, "high": 3, "when": {"threshold_rule": "pr_curve"}},
    },
    "budget": {"trials": 3},
}


START = {"learning_rate": 0.1, "dilate": 3, "threshold_rule": "grid"}
PRICES = {"minutes_per_label": 0.05, "minutes_per_mask": 2.0}
COUNTED = {"search__num_segmented": {"type": "int", "low": 1, "high": 9}}


def changed(**parts: object) -> dict:
    """GOOD with values at dotted paths; None removes a key."""
    document = copy.deepcopy(GOOD)
    for path, value in parts.items():
        *folders, last = path.split("__")
        inner = document
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
        if value is None:
            del inner[last]
    return document


def test_a_good_space_is_read_and_survives_a_round_trip() -> None:
    space = space_file.parse(GOOD)
    assert space.search["learning_rate"] == FloatParam(low=0.001, high=1.0, log=True)
    assert space.search["threshold_factor"].when == {"threshold_rule": ("pr_curve",)}
    assert space_file.parse(yaml.safe_load(yaml.safe_dump(space.to_dict()))) == space


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(name=None), r"name: is missing; add it"),
        (changed(budget=None), r"budget: is missing"),
        (changed(nane="x"), r"nane: is not a known key; did you mean 'name'\?"),
        (changed(train__learning_rat=1), r"train\.learning_rat: is not a field of a run; did you mean 'learning_rate'\?"),
        (changed(search__delta=1), r"search\.delta: is not a field of a run"),
        (changed(search__learning_rate__low=2.0), r"search\.learning_rate: low must not be above high, found low 2, high 1"),
        (changed(search__learning_rate__low=0), r"search\.learning_rate\.low: must be above 0 on a log scale, found 0"),
        (changed(search__learning_rate__lo=0.1), r"search\.learning_rate\.lo: is not a known key; did you mean 'low'\?"),
        (changed(search__dilate__high=8), r"must divide the range from low to high, found step 2 in 1 to 8; let high be 7 or 9"),
        (changed(search__dilate__step=3), r"search\.dilate: must be an odd whole number from 1 to 99, found 4"),
        (changed(search__dilate__type="integer"), r"search\.dilate\.type: must be one of float, int, categorical, found 'integer'"),
        (changed(search__learning_rate__step=0.1), r"cannot have both log and step"),
        (changed(search__threshold_rule__choices=["best"]), r"must be one of min_of_max, pr_curve, grid, found 'best'"),
        (changed(search__threshold_rule__choices=[]), r"must be a list of plain values, at least one, found \[\]"),
        (changed(search__threshold_rule__choices=["grid", "grid"]), r"must differ from each other"),
        (changed(search__threshold_factor__when={"rule": "x"}), r"must name a categorical parameter of this search"),
        (changed(search__threshold_factor__when={"threshold_rule": "x"}), r"must be among the choices of threshold_rule, found 'x'"),
        (
            changed(search__threshold_factor__when={"threshold_rule": []}),
            r"search\.threshold_factor\.when\.threshold_rule: must name a choice of threshold_rule, or it never applies, found \[\]",
        ),
        (changed(train__dilate=1), r"search\.dilate: is fixed under train as well; remove one of the two"),
        (changed(train__learning_rate="1e-3"), r"train\.learning_rate: .*found '1e-3'; YAML takes this for text; write 0\.001"),
        (changed(train__seed=3), r"train\.seed: is set as seed, at the top level; move it there"),
        (changed(objective={"metric": "dice"}), r"objective\.metric: must be one of dice_mean, .*found 'dice'; did you mean 'dice_mean'"),
        (changed(objective={"metric": "dice_mean", "mode": "min"}), r"objective\.mode: must be max"),
        (changed(objective=[{"metric": "f1"}]), r"objective: must be one objective or a list of two, a figure and a cost, found a list of 1; keep two"),
        (changed(objective=[{"metric": "dice_mean"}, {"metric": "f1"}]), r"objective\[1\]\.metric: must be one of num_segmented, labelling_minutes, device_seconds, found 'f1'"),
        (changed(objective=[{"metric": "dice"}, {"metric": "device_seconds"}]), r"objective\[0\]\.metric: must be one of dice_mean, .*did you mean 'dice_mean'"),
        (changed(objective=[{}, {"metric": "device_seconds", "mode": "max"}]), r"objective\[1\]\.mode: must be min: the second objective is a cost, found 'max'"),
        (changed(objective=[{}, {}]), r"objective\[1\]\.metric: is missing; add it"),
        (changed(objective=[{}, {"metric": "num_segmented"}]), r"objective\[1\]\.metric: num_segmented must be searched, .*; search num_segmented, or keep one objective"),
        (changed(objective=[{}, {"metric": "labelling_minutes"}], labelling=PRICES), r"objective\[1\]\.metric: num_segmented must be searched"),
        (
            changed(objective=[{}, {"metric": "labelling_minutes"}], **COUNTED),
            r"labelling: must say what a label and a mask take where labelling_minutes is an objective, found no prices; add labelling: \{minutes_per_label: 0\.05",
        ),
        (
            changed(objective=[{}, {"metric": "labelling_minutes"}], labelling=PRICES | {"minutes_per_mask": 0}, **COUNTED),
            r"labelling\.minutes_per_mask: must be above 0 where labelling_minutes is an objective, .*, found 0; set it",
        ),
        (
            changed(objective=[{}, {"metric": "num_segmented"}], labelling={"minutes_per_label": 0, "minutes_per_mask": 0}, **COUNTED),
            r"labelling: must have a price above 0, found 0 for a label and for a mask; set one of them",
        ),
        (
            changed(objective=[{}, {"metric": "num_segmented"}], labelling={"minutes_per_label": -1}, **COUNTED),
            r"labelling\.minutes_per_mask: is missing; add it\n  labelling\.minutes_per_label: must be a number of minutes, 0 or more, found -1",
        ),
        (changed(labelling=PRICES | {"minutes": 1}), r"labelling\.minutes: is not a known key"),
        (changed(labelling=PRICES), r"labelling: belongs to an objective of num_segmented or labelling_minutes, found one objective; add objective"),
        (
            changed(objective=[{}, {"metric": "device_seconds"}], labelling=PRICES),
            r"labelling: belongs to an objective of num_segmented or labelling_minutes, found 'device_seconds'; .*, or remove it",
        ),
        (
            changed(objective=[{}, {"metric": "device_seconds"}], scheduler="median"),
            r"scheduler: must be none where device_seconds is an objective: .*, found 'median'; say scheduler: none",
        ),
        (
            changed(objective=[{}, {"metric": "device_seconds"}], sampler="cmaes", constraints=[{"metric": "f1", "min": 0.1}]),
            r"sampler: cmaes knows nothing of two objectives or constraints, found 'cmaes'; use tpe or gp",
        ),
        (changed(constraints={"metric": "recall"}), r"constraints: must be a list such as \[\{metric: recall, min: 0\.9\}\], found"),
        (changed(constraints=[{"metric": "recal", "min": 0.9}]), r"constraints\[0\]\.metric: must be one of dice_mean, .*, found 'recal'; did you mean 'recall'"),
        (changed(constraints=[{"min": 0.9}]), r"constraints\[0\]\.metric: is missing; add it"),
        (changed(constraints=[{"metric": "recall"}]), r"constraints\[0\]: must have either min or max, found 'neither'; keep one"),
        (changed(constraints=[{"metric": "recall", "min": 0.1, "max": 0.9}]), r"constraints\[0\]: must have either min or max, found min and max; keep one"),
        (changed(constraints=[{"metric": "recall", "min": 90}]), r"constraints\[0\]\.min: must be a number from 0 to 1, as figures are, found 90"),
        (
            changed(constraints=[{"metric": "recall", "min": 0.1}, {"metric": "recall", "max": 0.9}]),
            r"constraints\[1\]\.metric: must be bounded once, found 'recall'; keep one of the two",
        ),
        (changed(sampler="bayes"), r"sampler: must be one of tpe, gp, cmaes, qmc, random, grid, found 'bayes'"),
        (changed(scheduler="hyper"), r"scheduler\.name: must be one of asha, hyperband, median, top_k, none, found 'hyper'"),
        (changed(cross_validation=5), r"cross_validation: must be a mapping of keys to values, found 5"),
        (changed(cross_validation={"fold": 5}), r"cross_validation\.fold: is not a known key; did you mean 'folds'\?"),
        (changed(cross_validation={"folds": 1}), r"cross_validation\.folds: must be a whole number from 2 to 20, found 1"),
        (changed(cross_validation={"folds": 21}), r"cross_validation\.folds: must be a whole number from 2 to 20, found 21"),
        (changed(cross_validation={"folds": 2, "nested": True}), r"from 3 to 20, for a nested one trains without two of them, found 2"),
        (changed(cross_validation={"nested": True}, constraints=[{"metric": "recall", "min": 0.5}]), r"cross_validation\.nested: must be false with constraints.*leave one of the two out"),
        (changed(cross_validation={}, scheduler={"name": "asha", "min_epochs": 9}), r"min_epochs: must be a whole number from 1 to cross_validation\.folds, 5, found 9"),
        (changed(cross_validation={}, scheduler={"name": "asha", "min_epochs": 5}), r"must be less than cross_validation\.folds, 5: after the last fold nothing is left to stop"),
        (changed(scheduler={"name": "asha", "min_epochs": 9}), r"scheduler\.min_epochs: must be a whole number from 1 to train\.epochs, 4, found 9"),
        (changed(budget={}), r"budget: needs at least one of trials, hours, device_hours, money, found \{\}"),
        (changed(budget={"trials": 0}), r"budget\.trials: must be a whole number of at least 1 \(the baseline is the first trial\), found 0"),
        (changed(budget={"money": 3}), r"money and price_per_device_hour go together"),
        (changed(data__height=100), r"data: input height and width must be multiples of 8 px .*found 100x128; use 104x128"),
        (changed(data__height=64, data__width=64), r"at least 2 positions, found 1 for 64x64 px"),
        (changed(data__height=64.0), r"data\.height: must be a whole number of px above 0, found 64\.0"),
        (changed(data__test_share=0.8), r"must leave at least 0\.1 to training"),
        (changed(start_from=[START | {"dilate": 2}]), r"1 problem:\n  start_from\[0\]\.dilate: must be a whole number from 1 to \d+ in steps of 2, found 2$"),
        (changed(start_from=[START, START | {"learning_rate": "1e-1"}]), r"1 problem:\n  start_from\[1\]\.learning_rate: must be a number from 0\.001 to 1, found '1e-1'; YAML takes this for text; write 0\.1$"),
        (changed(start_from=[START | {"threshold_rule": "gird"}]), r"1 problem:\n  start_from\[0\]\.threshold_rule: must be one of pr_curve, grid, found 'gird'$"),
        (changed(start_from=[START | {"threshold_factor": 2}]), r"1 problem:\n  start_from\[0\]\.threshold_factor: applies only with threshold_rule pr_curve, found 2; remove it$"),
        (changed(start_from=[START | {"threshold_rule": "pr_curve"}]), r"1 problem:\n  start_from\[0\]\.threshold_factor: is missing"),
        (changed(start_from=[START | {"dilat": 1}]), r"1 problem:\n  start_from\[0\]\.dilat: is not a searched parameter; did you mean 'dilate'\?$"),
        (changed(train__epochs="1e1"), r"train\.epochs: must be a whole number .*, found '1e1'; write 10$"),
        (changed(budget={"trials": "1e2"}), r"budget\.trials: must be a whole number .*, found '1e2'; write 100$"),
        (changed(search__dilate__low="1e0"), r"search\.dilate\.low: must be a whole number, found '1e0'; write 1$"),
        (changed(seed=2.0), r"seed: must be a whole number from 0 to 2147483647, found 2\.0; write 2$"),
        (changed(seed="1e-1"), r"seed: must be a whole number from 0 to 2147483647, found '1e-1'$"),
        (changed(train__optimizer="1e1"), r"train\.optimizer: must be one of sgd, adam, found '1e1'$"),
        (changed(name="a b"), r"name: must be a word for file names"),
        (changed(name="a" * 101), r"name: must be a word for file names: letters, digits, - and _, at most 100, found"),
        (changed(seed=3_000_000_000), r"\A.* 1 problem:\n  seed: must be a whole number from 0 to 2147483647, found 3000000000"),
        ([], r"the file: must be a mapping of keys to values, found \[\]"),
        (
            changed(objective={"metric": "decision_ap"}, scheduler={"name": "asha", "compare": "objective"}),
            r"scheduler\.compare: must be segmentation for an objective that depends on the decision, with dynamic_balance",
        ),
    ],
)  # fmt: skip
def test_each_problem_has_its_message(document: object, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        space_file.parse(document)


@pytest.mark.parametrize("optimizers", [["adam", "sgd"], ["sgd", "adam"]], ids=str)
@pytest.mark.parametrize("turns", [[False, True], [True, False]], ids=str)
def test_what_fields_ask_of_each_other_is_tried_under_every_condition(optimizers: list, turns: list) -> None:
    """Neither the first choices of all nor the last may be the pair that cannot be."""
    document = changed(
        data={"height": 64, "width": 128},
        search__optimizer={"type": "categorical", "choices": optimizers},
        search__augment_quarter_turns={"type": "categorical", "choices": turns, "when": {"optimizer": "adam"}},
    )
    with pytest.raises(SpaceError, match=r"search: augment_quarter_turns needs a square input") as caught:
        space_file.parse(document)
    assert len(caught.value.problems) == 1
    document["data"] = {"height": 128, "width": 128}
    space_file.parse(document)
    document = changed(data={"height": 64, "width": 128}, train__augment_quarter_turns=True)
    with pytest.raises(SpaceError, match=r"train: augment_quarter_turns needs a square input"):
        space_file.parse(document)


def test_a_condition_under_a_condition_is_met_too() -> None:
    document = changed(
        data={"height": 64, "width": 128},
        search__architecture={
            "type": "categorical",
            "choices": ["segdecnet", "segdecnet_decoder", "segdecnet_plusplus"],
        },
        search__optimizer={
            "type": "categorical",
            "choices": ["sgd", "adam"],
            "when": {"architecture": ["segdecnet_decoder"]},
        },
        search__augment_quarter_turns={"type": "categorical", "choices": [True, False], "when": {"optimizer": "adam"}},
    )
    with pytest.raises(SpaceError, match="needs a square input"):
        space_file.parse(document)


def test_a_parameter_that_never_applies_is_refused() -> None:
    """Its parent applies only where another one excludes it."""
    document = changed(
        search__architecture={"type": "categorical", "choices": ["segdecnet", "segdecnet_plusplus"]},
        search__optimizer={"type": "categorical", "choices": ["sgd", "adam"], "when": {"architecture": "segdecnet"}},
        search__augment_flips={
            "type": "categorical", "choices": [True, False], "when": {"optimizer": "adam", "architecture": "segdecnet_plusplus"},
        },
    )  # fmt: skip
    with pytest.raises(SpaceError, match=r"search\.augment_flips\.when: can never be met"):
        space_file.parse(document)


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(SpaceError) as caught:
        space_file.parse(changed(sampler="x", seed=-1, train__epochs=0, data__layout="coco", budget__trials="many"))
    assert len(caught.value.problems) == 5


def test_rules_between_keys_come_in_the_same_error() -> None:
    document = changed(
        train__learning_rat=1,
        objective={"metric": "decision_ap"},
        scheduler={"name": "asha", "compare": "objective"},
        start_from=[START | {"dilate": 2}],
    )
    with pytest.raises(SpaceError) as caught:
        space_file.parse(document)
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert keys == ["train.learning_rat", "scheduler.compare", "start_from[0].dilate"]


def test_a_file_in_another_encoding_is_refused(tmp_path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: a\n# für Risse\n".encode("latin-1"))
    with pytest.raises(
        SpaceError, match=r"1 problem:\n  must be text in UTF-8, found byte 0xfc in line 2; save it as UTF-8$"
    ):
        space_file.load(path)


def test_a_key_that_stands_twice_is_refused(tmp_path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(SpaceError, match="the key 'name' stands twice"):
        space_file.load(path)


def test_text_that_is_no_yaml_and_names_that_are_no_space() -> None:
    with pytest.raises(SpaceError, match="did you mean 'crackforest'"):
        space_file.load("crackforst")


def test_a_yaml_file_cannot_run_code(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(SpaceError, match="is not valid YAML"):
        space_file.load(path)


def test_conditions_put_parents_first_and_decide_what_is_active() -> None:
    document = changed()
    document["search"] = dict(reversed(document["search"].items()))
    space = space_file.parse(document)
    names = list(space.search)
    assert names.index("threshold_rule") < names.index("threshold_factor")
    grid = {"learning_rate": 0.1, "dilate": 3, "threshold_rule": "grid"}
    assert space.contains(grid)
    assert not space.contains(grid | {"threshold_factor": 2})
    assert space.contains(grid | {"threshold_rule": "pr_curve", "threshold_factor": 2})
    assert not space.contains(grid | {"dilate": 2})


def test_bounds_are_inclusive() -> None:
    dilate = IntParam(low=1, high=7, step=2)
    assert [value for value in range(-1, 10) if dilate.contains(value)] == [1, 3, 5, 7]


def test_the_baseline_is_a_point_of_the_space_only_if_everything_fits() -> None:
    space = space_file.parse(GOOD)
    assert space.baseline_params() == {
        "learning_rate": 1.0, "dilate": 1, "threshold_rule": "pr_curve", "threshold_factor": 1,
    }  # fmt: skip
    assert space_file.parse(changed(train__optimizer="adam")).baseline_params() is None
    assert space_file.parse(changed(search__learning_rate__high=0.5)).baseline_params() is None
    baseline = space_file.parse(changed(train__optimizer="adam", train__epochs=9)).baseline_config(seed=3)
    assert (baseline.optimizer, baseline.learning_rate, baseline.epochs, baseline.width) == ("sgd", 1.0, 9, 0.25)


def test_the_baseline_has_nothing_that_came_after_the_results_page() -> None:
    later = {
        "schedule": "cosine", "hard_mining_places": 1, "blacken": True, "lower_threshold": 0.9, "norm": "standard",
        "pixel_positive_weight": 20.0, "augment_color": 0.2, "best_by": "segmentation",
    }  # fmt: skip
    space = space_file.parse(changed(train=GOOD["train"] | later))
    assert space.baseline_params() is None
    assert space.baseline_config(0) == space_file.parse(GOOD).baseline_config(0)


@pytest.mark.parametrize("name", ["width", "epochs", "batch_size"])
def test_what_the_baseline_shares_cannot_be_searched(name: str) -> None:
    document = changed()
    document["train"].pop(name, None)
    document["search"][name] = {"type": "categorical", "choices": [1, 2]}
    with pytest.raises(
        SpaceError, match=f"search.{name}: is what all trials share with the baseline; fix it under train"
    ):
        space_file.parse(document)


def test_the_fingerprint_knows_what_is_searched_and_not_what_may_be_spent() -> None:
    prints = [space_file.parse(d).fingerprint() for d in (GOOD, changed(budget__trials=9), changed(train__epochs=5))]
    assert prints[0] == prints[1] != prints[2]


TWO = changed(objective=[{"metric": "f1"}, {"metric": "device_seconds"}])
MASKS = changed(
    objective=[{"metric": "f1"}, {"metric": "num_segmented"}],
    search__num_segmented={"type": "int", "low": 1, "high": 9},
)
MINUTES = changed(objective=[{"metric": "f1"}, {"metric": "labelling_minutes"}], labelling=PRICES, **COUNTED)
BOUNDED = changed(constraints=[{"metric": "recall", "min": 0.5}, {"metric": "decision_specificity", "min": 0.9}])


def test_goals_are_read_and_survive_a_round_trip() -> None:
    space = space_file.parse(MASKS)
    assert space.objectives == (Objective(metric="f1"), Objective(metric="num_segmented", mode="min"))
    assert space_file.parse(BOUNDED).constraints == (
        Constraint(metric="recall", min=0.5), Constraint(metric="decision_specificity", min=0.9),
    )  # fmt: skip
    priced = space_file.parse(MINUTES)
    assert priced.cost == Objective(metric="labelling_minutes", mode="min")
    assert priced.labelling == Labelling(minutes_per_label=0.05, minutes_per_mask=2.0)
    assert priced.labelling.minutes(images=400, masks=30) == pytest.approx(80.0)
    for document in (TWO, MASKS, BOUNDED, MINUTES, MASKS | {"labelling": PRICES}):
        space = space_file.parse(document)
        assert space_file.parse(yaml.safe_load(yaml.safe_dump(space.to_dict()))) == space
        jsonschema.validate(document, space_file.schema())
        jsonschema.validate(space.to_dict(), space_file.schema())


def test_goals_belong_to_the_fingerprint_and_their_absence_changes_none() -> None:
    assert space_file.parse(GOOD).fingerprint() == "06a4134cc31c"  # as it was before there were any
    documents = [
        GOOD,
        TWO,
        BOUNDED,
        changed(objective={"metric": "f1"}),
        changed(constraints=BOUNDED["constraints"][:1]),
        MASKS,
        MINUTES,
        MINUTES | {"labelling": PRICES | {"minutes_per_mask": 3.0}},  # other costs, another front
    ]
    assert len({space_file.parse(document).fingerprint() for document in documents}) == len(documents)
    assert space_file.parse(changed(constraints=[])).fingerprint() == space_file.parse(GOOD).fingerprint()
    shown_beside = MASKS | {"labelling": PRICES}
    assert space_file.parse(shown_beside).fingerprint() == space_file.parse(MASKS).fingerprint()


def test_how_far_a_figure_lies_beyond_a_bound() -> None:
    low, high = Constraint(metric="recall", min=0.75), Constraint(metric="dice_std", max=0.25)
    assert [low.excess(value) for value in (0.5, 0.75, 1.0, None)] == [0.25, 0.0, -0.25, 1.0]
    assert [high.excess(value) for value in (0.5, 0.25, 0.0, None)] == [0.25, 0.0, -0.25, 1.0]
    assert Constraint(metric="dice_std", max=0.0).excess(0.5) == 0.5


def test_the_schema_takes_good_files_and_refuses_misspelt_ones() -> None:
    validator = jsonschema.Draft202012Validator(space_file.schema())
    jsonschema.Draft202012Validator.check_schema(space_file.schema())
    validator.validate(GOOD)
    for bad in (
        changed(nane=1), changed(train__epoch=3), changed(search__dilate__type="real"), changed(sampler="x"),
        changed(objective=[{}]), changed(objective=[{}, {"metric": "f1"}]), changed(constraints=[{"metric": "f1"}]),
        changed(objective=[{}, {"metric": "device_seconds"}, {"metric": "device_seconds"}]),
        changed(constraints=[{"metric": "f1", "min": 0.1, "max": 0.2}]), changed(constraints=[{"metric": "threshold", "min": 0}]),
    ):  # fmt: skip
        assert not validator.is_valid(bad)


JUNK = st.sampled_from(
    [None, -1, 0, 1.5, float("nan"), "x", "1e-3", True, [], [1], [{}], {}, {"a": 1}, {"type": "int"}]
)


@given(st.data())
def test_whatever_stands_in_a_file_is_a_space_or_a_list_of_problems(data: st.DataObject) -> None:
    """Any one or two nodes of a good file replaced by anything."""
    cost = data.draw(st.sampled_from(COSTS))
    document = changed(
        start_from=[] if cost in MASK_COSTS else [copy.deepcopy(START)],
        sampler="tpe",
        objective=[{"metric": "f1", "mode": "max"}, {"metric": cost}],
        constraints=[{"metric": "recall", "min": 0.5}],
        **(copy.deepcopy(COUNTED) | {"labelling": dict(PRICES)} if cost in MASK_COSTS else {}),
    )
    for _ in range(data.draw(st.integers(1, 2))):
        node: Any = document
        while True:
            key = data.draw(st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node))))
            inside = node[key]
            if not inside or not isinstance(inside, dict | list) or data.draw(st.booleans()):
                node[key] = copy.deepcopy(data.draw(JUNK))
                break
            node = inside
    try:
        space = space_file.parse(document)
    except SpaceError:
        return  # any other error would be ours
    assert space_file.parse(space.to_dict()) == space


def test_cross_validation_is_part_of_what_is_searched() -> None:
    plain, folds, nested = (
        space_file.parse(changed(**parts))
        for parts in ({}, {"cross_validation": {}}, {"cross_validation": {"nested": True}})
    )
    assert plain.cross_validation is None
    assert "cross_validation" not in plain.to_dict()
    assert folds.to_dict()["cross_validation"] == {"folds": 5, "nested": False}
    assert len({space.fingerprint() for space in (plain, folds, nested)}) == 3
    assert space_file.parse(nested.to_dict()) == nested
    assert [(space.trial_length, space.unit) for space in (plain, nested)] == [(4, "epoch"), (5, "fold")]
    jsonschema.validate(changed(cross_validation={"folds": 3, "nested": True}), space_file.schema())
    for wrong in ({"folds": 1}, {"nested": 1}, {"k": 5}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(cross_validation=wrong), space_file.schema())


def test_folds_that_are_trained_to_their_ends_may_be_compared_by_the_objective() -> None:
    late = {"objective": {"metric": "decision_ap"}, "scheduler": {"name": "asha", "compare": "objective"}}
    with pytest.raises(SpaceError, match="the decision learns late"):
        space_file.parse(changed(**late, train__dynamic_balance=True))
    space_file.parse(changed(**late, train__dynamic_balance=True, cross_validation={}))
