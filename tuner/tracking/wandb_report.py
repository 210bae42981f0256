"""What the report's W&B run holds: tables and pictures of a report, and as artifacts the report and the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

_MOST_EXAMPLES = 24
"""W&B shows so many pictures of one key side by side at ease."""


def is_evaluated(directory: Path) -> bool:
    """Whether a run has a report on a winner that was evaluated; one on a search alone is not logged."""
    try:
        metrics = json.loads((directory / "report" / "metrics.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # none, or torn: the next report replaces it
        return False
    return bool(metrics.get("evaluated", True))  # reports of 0.1.0 had a winner


def log_report(wandb: Any, run: Any, name: str, directory: Path) -> None:
    """Logs what lies in `report/` and `best/` of a run's directory. FileNotFoundError if there is no report."""
    report = directory / "report"
    metrics = json.loads((report / "metrics.json").read_text())
    run.summary.update(_summary(metrics))
    figures = sorted((report / "figures").glob("*.png"))
    examples = sorted((report / "dices").glob("*.png"))
    few = examples[:: max(1, -(-len(examples) // _MOST_EXAMPLES))]
    run.log(
        {f"figure/{file.stem}": wandb.Image(str(file)) for file in figures}
        | {"report/examples": [wandb.Image(str(file), caption=file.stem) for file in few]}
        | {f"report/{key}": wandb.Table(*table) for key, table in _tables(metrics, directory).items()}
    )
    for kind, folder, about in (
        ("model", directory / "best", "weights, configuration and thresholds of the best trial"),
        ("report", report, "the report, its figures, and the test figures and predictions for programs"),
    ):
        if folder.exists():
            artifact = wandb.Artifact(f"{name}-{kind}", type=kind, description=about, metadata=_summary(metrics))
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)


def _summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """The winner, and its figures on test."""
    test = {f"test/{key}": value for key, value in metrics["test"].items() if isinstance(value, int | float)}
    return {"winner": metrics["best"]["trial"], "thresholds_chosen_on": metrics["thresholds_chosen_on"], **test}


def _tables(metrics: dict[str, Any], directory: Path) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows by name."""
    return {
        "test": _test_table(metrics),
        "trials": _trials_table(directory / "records.jsonl"),
        "predictions": _csv_table(directory / "report" / "predictions.csv"),
        "data": _data_table(metrics["data"]),
    }


def _test_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Each figure of winner and baseline on test, with 95 % intervals and the paired difference."""
    test, baseline, difference = metrics["test"], metrics["baseline"] or {}, metrics["difference"] or {}
    columns = ["figure", "winner", "low", "high", "baseline", "baseline low", "baseline high",
               "difference", "difference low", "difference high"]  # fmt: skip
    rows = []
    for key in test:
        if key == "ci95":
            continue
        theirs = difference.get(key) or {}
        rows.append([
            key, test[key], *_interval(test["ci95"].get(key)),
            baseline.get(key), *_interval((baseline.get("ci95") or {}).get(key)),
            theirs.get("value"), *_interval(theirs.get("ci95")),
        ])  # fmt: skip
    return columns, rows


def _interval(ci95: list[float] | None) -> list[float | None]:
    return list(ci95) if ci95 else [None, None]


def _trials_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    searched = sorted({name for record in records for name in record["params"]})
    own = ["trial", "baseline", "status", "reason", "value", "best_epoch", "epochs", "seconds", "replayed_from"]
    rows = [
        [record.get(name) for name in own] + [_cell(record["params"].get(name)) for name in searched]
        for record in records
    ]
    return [*own, *searched], rows


def _cell(value: Any) -> Any:
    """A column of a W&B table has one type, and a parameter may be a number here and a word there."""
    return str(value) if isinstance(value, str | bool) else value


def _csv_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    with path.open(newline="") as file:
        columns, *rows = csv.reader(file)
    return columns, [[_number(cell) for cell in row] for row in rows]


def _number(cell: str) -> Any:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def _data_table(data: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = ["split", "positive", "negative", "segmented"]
    return columns, [[split, *(data[split][c] for c in columns[1:])] for split in ("train", "validation", "test")]
