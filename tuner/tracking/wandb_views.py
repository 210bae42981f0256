"""The workspace and the report of a search in W&B, made of its space: which panels, over which runs.

Pure; nothing is saved here, though a report looks its project up when it is turned into JSON. wandb-workspaces is
imported on use: it is an extra, and imports wandb. Runs have flat config keys (the fields of a run), a history by
`epoch` and a summary as `tuner.tracking.wandb_log` writes them.
"""

from __future__ import annotations

from typing import Any

from tuner.space import ChoiceParam, Objective, Param, Space
from tuner.tracking.sweep import METRIC

CURVES = ("val/objective", METRIC, "loss/total", "loss/segmentation", "loss/decision", "val/dice_mean", "val/iou_mean")
USE = ("use/cpu_percent", "use/memory_mib", "use/device_percent", "use/device_memory_mib")
"""of worker and device, by epoch"""
PREVIEWS = 4
"""pictures that a trial has, named preview/0 and so on"""
SUMMARY = ("status", METRIC, "best/threshold", "epochs")
"""columns of the table of runs, beside the searched parameters"""
MOST_RUNS_SHOWN = 100
"""in a panel of curves; W&B's own default is 10"""

_WIDTH = 24
"""columns of a report's grid"""
_PANEL_HEIGHT = 8


def workspace(space: Space, search: str, entity: str, project: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace` of the runs whose group is `search`."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    return ws.Workspace(
        entity=entity,
        project=project,
        name=search,
        sections=[
            ws.Section(
                name=name,
                panels=panels,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=min(3, len(panels)), rows=-(-len(panels) // 3)),
            )
            for name, panels in _sections(space).items()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=MOST_RUNS_SHOWN),
        runset_settings=ws.RunsetSettings(
            filters=_of_search(search),
            order=[expr.Ordering(expr.Summary(METRIC), ascending=False)],
            pinned_columns=_columns(space),
        ),
    )


def report(space: Space, search: str, entity: str, project: str) -> Any:
    """A `wandb_workspaces.reports.v2.Report`: what the search is, its panels, its runs side by side."""
    import wandb_workspaces.reports.v2 as wr

    def grid(panels: list[Any], across: int) -> Any:
        width = _WIDTH // across
        for n, panel in enumerate(panels):
            row, column = divmod(n, across)
            panel.layout = wr.Layout(x=column * width, y=row * _PANEL_HEIGHT, w=width, h=_PANEL_HEIGHT)
        runs = wr.Runset(
            entity=entity,
            project=project,
            name=search,
            filters=_of_search(search),
            order=[wr.OrderBy(wr.SummaryMetric(METRIC), ascending=False)],
            pinned_columns=["run:displayName", *_columns(space)],
        )
        return wr.PanelGrid(runsets=[runs], panels=panels)

    blocks: list[Any] = [wr.H1("What is searched"), wr.MarkdownBlock(describe(space))]
    for name, panels in _sections(space).items():
        blocks += [wr.H1(name), grid(panels, across=1 if len(panels) == 1 else 2)]
    blocks += [wr.H1("Runs"), grid([wr.RunComparer(diff_only="split")], across=1)]
    return wr.Report(
        entity=entity,
        project=project,
        title=f"Search {search}",
        description=f"{_objectives(space)}; search space {space.name}",
        blocks=blocks,
        width="fluid",
    )


def describe(space: Space) -> str:
    """What a search is, in Markdown. The words of the space's file stand in code spans, where nothing has a meaning."""
    size = f"{space.data.height}x{space.data.width} px"
    train = ", ".join(_code(f"{name}: {value}") for name, value in space.train.items())
    lines = [
        f"- **Objective**: {_objectives(space)}, on validation. The test split has no part in a search.",
        *(f"- **Constraint**: {_constraint(one.metric, one.min, one.max)}" for one in space.constraints),
        f"- **Data**: layout {_code(space.data.layout)}, {size}",
        f"- **Budget**: {_budget(space)}",
        f"- **Sampler**: {space.sampler}; **scheduler**: {space.scheduler.name}; **seed**: {space.seed}",
        f"- **Baseline**: {_baseline(space)}",
        *([f"- **Fixed**: {train}"] if train else []),
        "- **Searched**:" if space.search else "- **Searched**: nothing, the baseline is the only trial",
        *(f"    - {_code(name)}: {_range(param)}" for name, param in space.search.items()),
    ]
    return "\n".join(lines)


def _sections(space: Space) -> dict[str, list[Any]]:
    """The panels, by the name of their section."""
    import wandb_workspaces.reports.v2 as wr

    def curve(name: str) -> Any:
        return wr.LinePlot(title=name, x="epoch", y=[name], title_x="epoch", max_runs_to_show=MOST_RUNS_SHOWN)

    axes = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(name), log=True if _is_log(param) else None)
        for name, param in space.search.items()
    ]
    axes += [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key), display_name=objective.metric)
        for key, objective in _outcomes(space).items()
    ]
    figure, cost = _figure_and_cost(space)
    return {
        "Search": [
            wr.ParallelCoordinatesPlot(title="Searched parameters and what came out", columns=axes),
            wr.ParameterImportancePlot(with_respect_to=METRIC),
            wr.ScatterPlot(
                title=f"{space.objective.metric} by {space.cost.metric if space.cost else 'device seconds'}",
                x=wr.SummaryMetric(cost),
                y=wr.SummaryMetric(figure),
                running_ymax=True,  # from left to right the best so far: the Pareto front
            ),
        ],
        "Curves": [curve(name) for name in CURVES],
        "Predictions": [
            wr.MediaBrowser(
                title="input, truth, probability and mask at the best epoch so far",
                media_keys=[f"preview/{n}" for n in range(PREVIEWS)],
            )
        ],
        "Use": [curve(name) for name in USE],
    }


def _outcomes(space: Space) -> dict[str, Objective]:
    """The objectives by their keys in a run's summary."""
    if space.cost is None:
        return {METRIC: space.objective}
    return {f"best/values_{n}": objective for n, objective in enumerate(space.objectives, 1)}


def _figure_and_cost(space: Space) -> tuple[str, str]:
    """Their keys in a run's summary."""
    if space.cost is None:
        return METRIC, "device_seconds"
    figure, cost = _outcomes(space)
    return figure, cost


def _of_search(search: str) -> Any:
    """The filter of a search's trials."""
    from wandb_workspaces import expr

    return expr.And(expr.Metric("Group") == search, expr.Metric("JobType") == "trial")


def _columns(space: Space) -> list[str]:
    keys = dict.fromkeys((*SUMMARY[:1], *_outcomes(space), *SUMMARY[1:]))
    return [*(f"config:{name}.value" for name in space.search), *(f"summary:{key}" for key in keys)]


def _is_log(param: Param) -> bool:
    return not isinstance(param, ChoiceParam) and param.log


def _objectives(space: Space) -> str:
    words = {"max": "larger is better", "min": "smaller is better"}
    return " and ".join(f"{_code(one.metric)} ({words[one.mode]})" for one in space.objectives)


def _constraint(metric: str, low: float | None, high: float | None) -> str:
    return f"{_code(metric)} at least {low:g}" if low is not None else f"{_code(metric)} at most {high:g}"


def _budget(space: Space) -> str:
    budget = space.budget
    price = f" at {budget.price_per_device_hour:g} a device-hour" if budget.price_per_device_hour else ""
    limits = {
        "trials": budget.trials,
        "hours": budget.hours,
        "device-hours": budget.device_hours,
        f"of money{price}": budget.money,
    }
    return "at most " + ", ".join(f"{most:g} {what}" for what, most in limits.items() if most is not None)


def _baseline(space: Space) -> str:
    """The results page's method: always the first trial, tagged `baseline`."""
    params = space.baseline_params()
    if params is None:
        return "the results page's method, outside the space; its run has the tag `baseline`"
    point = ", ".join(_code(f"{name}: {value}") for name, value in params.items())
    return f"the results page's method, {point or 'all of this space'}; its run has the tag `baseline`"


def _range(param: Param) -> str:
    if isinstance(param, ChoiceParam):
        words = "one of " + ", ".join(_code(choice) for choice in param.choices)
    else:
        words = f"{param.low:g} to {param.high:g}"
        if param.log:
            words += ", on a log scale"
        elif param.step not in (None, 1):
            words += f" in steps of {param.step:g}"
    for parent, values in param.when.items():
        words += f", where {_code(parent)} is {' or '.join(_code(value) for value in values)}"
    return words


def _code(value: object) -> str:
    """A code span of one line, which nothing in `value` can end."""
    words = " ".join(str(value).split()).replace("`", "'")
    return f"`{words or ' '}`"
