"""The workspace and the report of a search, as wandb-workspaces would send them; nobody is asked."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner import space_file, trial
from tuner.space import Budget, ChoiceParam, Constraint, FloatParam, IntParam, Objective, Space
from tuner.tracking import wandb_views
from tuner.tracking.names import history_row

DEMO = space_file.load("demo")
TWO_OBJECTIVES = replace(
    DEMO,
    search={**DEMO.search, "num_segmented": IntParam(low=1, high=8, when={"threshold_rule": ("grid",)})},
    cost=Objective(metric="num_segmented", mode="min"),
    constraints=(Constraint(metric="recall", min=0.9), Constraint(metric="dice_std", max=0.2)),
    budget=Budget(hours=2.5, money=10, price_per_device_hour=1.5),
)
SPACES = [*map(space_file.load, space_file.shipped()), TWO_OBJECTIVES]
names = [space.name for space in SPACES[:-1]] + ["two objectives"]
every_space = pytest.mark.parametrize("space", SPACES, ids=names)


def spec_of(space: Space, search: str = "cracks") -> dict[str, Any]:
    model = wandb_views.workspace(space, search, "me", "surfaces")._to_model()
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))["section"]


def sections(space: Space) -> dict[str, list[dict[str, Any]]]:
    return {one["name"]: one["panels"] for one in spec_of(space)["panelBankConfig"]["sections"]}


def panel(space: Space, section: str, kind: str) -> dict[str, Any]:
    (found,) = [one["config"] for one in sections(space)[section] if one["viewType"] == kind]
    return found


def outcomes(space: Space) -> list[str]:
    return ["summary:best/values_1", "summary:best/values_2"] if space.cost else ["summary:best/value"]


@every_space
def test_all_searched_parameters_and_all_objectives_are_axes(space) -> None:
    axes = panel(space, "Search", "Parallel Coordinates Plot")["columns"]
    assert [axis["accessor"] for axis in axes] == [
        *(f"config:{name}.value" for name in space.search),
        *outcomes(space),
    ]
    logs = {axis["accessor"][7:-6] for axis in axes if axis.get("log")}
    assert logs == {name for name, param in space.search.items() if getattr(param, "log", False)}
    assert [axis["displayName"] for axis in axes[len(space.search) :]] == [one.metric for one in space.objectives]


@every_space
def test_the_scatter_plot_is_of_the_two_objectives_or_of_the_time(space) -> None:
    plot = panel(space, "Search", "Scatter Plot")
    expected = tuple(outcomes(space)) if space.cost else ("summary:best/value", "summary:device_seconds")
    assert (plot["yAxis"], plot["xAxis"]) == expected
    assert panel(space, "Search", "Parameter Importance")["targetKey"] == "best/value"


@every_space
def test_only_the_trials_of_the_search_are_shown_and_the_best_first(space) -> None:
    (runs,) = spec_of(space)["runSets"]
    filters = {(one["key"]["section"], one["key"]["name"]): one for one in runs["filters"]["filters"]}
    assert {key: (one["op"], one["value"]) for key, one in filters.items()} == {
        ("run", "group"): ("=", "cracks"),
        ("run", "jobType"): ("=", "trial"),
    }
    assert all(one.get("connector", "AND") == "AND" for one in filters.values())
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "best/value"}, "ascending": False}]
    columns = runs["runFeed"]["columnOrder"]
    assert columns[0] == "run:displayName"
    assert {f"config:{name}.value" for name in space.search} < set(columns)
    assert set(outcomes(space)) < set(columns)
    assert {"summary:status", "summary:best/value", "summary:best/threshold", "summary:epochs"} < set(columns)


def test_curves_stand_over_the_epoch() -> None:
    for section, metrics in (("Curves", wandb_views.CURVES), ("Use", wandb_views.USE)):
        plots = [one["config"] for one in sections(DEMO)[section]]
        assert [plot["metrics"] for plot in plots] == [[metric] for metric in metrics]
        assert {plot["xAxis"] for plot in plots} == {"epoch"}
    assert spec_of(DEMO)["settings"]["xAxis"] == "epoch"


def test_what_is_drawn_is_what_is_logged() -> None:
    row = history_row(
        dict.fromkeys(("loss_segmentation", "loss_decision", "loss_total", "value", "dice_mean", "iou_mean"), 1.0)
    )
    assert set(wandb_views.CURVES) == {*row, "best/value"}
    assert panel(DEMO, "Predictions", "Media Browser")["mediaKeys"] == [f"preview/{n}" for n in range(trial._PREVIEWS)]
    assert wandb_views.PREVIEWS == trial._PREVIEWS


@every_space
def test_a_space_always_gives_the_same_workspace(space) -> None:
    def fixed() -> str:
        return re.sub(r'"__id__": "\w+"', "", json.dumps(spec_of(space)))

    assert fixed() == fixed()
    assert "__id__" not in fixed()


@every_space
def test_a_report_has_all_panels_and_the_table_of_runs(space) -> None:
    report = wandb_views.report(space, "cracks", "me", "surfaces")
    assert (report.entity, report.project, report.title) == ("me", "surfaces", "Search cracks")
    headings = [block.text for block in report.blocks if type(block).__name__ == "H1"]
    assert headings == ["What is searched", *sections(space), "Runs"]
    (text,) = [block.text for block in report.blocks if type(block).__name__ == "MarkdownBlock"]
    assert text == wandb_views.describe(space)
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    for grid in grids:
        (runs,) = grid.runsets
        assert (runs.entity, runs.project) == ("me", "surfaces")
        assert runs.filters == wandb_views.workspace(space, "cracks", "me", "surfaces").runset_settings.filters
        assert runs.pinned_columns == spec_of(space)["runSets"][0]["runFeed"]["columnOrder"]
    kinds = [[one._to_model().view_type for one in grid.panels] for grid in grids]
    assert kinds == [
        *([one["viewType"] for one in panels] for panels in sections(space).values()),
        ["Run Comparer"],
    ]


def test_panels_of_a_report_lie_side_by_side_and_do_not_overlap() -> None:
    for grid in (block for block in wandb_views.report(DEMO, "c", "me", "p").blocks if hasattr(block, "panels")):
        taken = [
            (x, y)
            for one in grid.panels
            for x in range(one.layout.x, one.layout.x + one.layout.w)
            for y in range(one.layout.y, one.layout.y + one.layout.h)
        ]
        assert len(taken) == len(set(taken))
        assert {x for x, _ in taken} == set(range(24))


def test_a_search_is_described() -> None:
    text = wandb_views.describe(TWO_OBJECTIVES)
    for words in (
        "`dice_positive_mean` (larger is better) and `num_segmented` (smaller is better)",
        "`recall` at least 0.9", "`dice_std` at most 0.2", "at most 2.5 hours, 10 of money at 1.5 a device-hour",
        "layout `auto`, 128x128 px", "**Sampler**: tpe; **scheduler**: asha", "`epochs: 12`",
        "`learning_rate`: 0.5 to 2, on a log scale", "one of `pr_curve`, `grid`",
        "`num_segmented`: 1 to 8, where `threshold_rule` is `grid`", "outside the space",
    ):  # fmt: skip
        assert words in text
    assert "`learning_rate: 1.0`, `delta_cls_loss: 0.01`, `dilate: 1`" in wandb_views.describe(
        space_file.load("crack_segmentation")
    )
    assert "nothing, the baseline is the only trial" in wandb_views.describe(space_file.load("results_page"))
    stepped = replace(DEMO, search={"lower_threshold": FloatParam(low=0.5, high=1.0, step=0.25)})
    assert "`lower_threshold`: 0.5 to 1 in steps of 0.25" in wandb_views.describe(stepped)


@given(st.text(alphabet="X`\n\r\u2028 <>[]()*#|\\", max_size=20))
def test_words_of_a_file_stay_in_code_spans(word) -> None:
    space = replace(DEMO, search={"threshold_rule": ChoiceParam(choices=(word, "grid"))}, train={"architecture": word})
    text = wandb_views.describe(space)
    plain = replace(DEMO, search={"threshold_rule": ChoiceParam(choices=("a", "grid"))}, train={"architecture": "a"})
    assert len(text.splitlines()) == len(wandb_views.describe(plain).splitlines())
    outside = re.sub(r"`[^`\n]+`", "", text)
    assert not re.search(r"[X`<>\\|]", outside)
