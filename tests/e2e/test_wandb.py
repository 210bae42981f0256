"""A real search logged to W&B offline, read back with W&B's own reader: after every kind of end, and after kills."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import kills
from model import synthetic
from tests.e2e.test_main_job import environment
from tests.tuner.tracking.test_wandb_runs import inspect
from tuner import run as runs
from tuner.tracking.names import chart_name
from tuner.tracking.wandb_files import files_of, report_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SPACE = """
name: small
data: {height: 64, width: 128, validation_share: 0.25, test_share: 0.25}
train: {width: 0.1, epochs: 4, precision: float32}
search:
  learning_rate: {type: categorical, choices: [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 100.0]}
start_from:
  - {learning_rate: 100.0}
  - {learning_rate: 0.75}
objective: {metric: dice_positive_mean}
scheduler: {name: asha, min_epochs: 1, reduction: 2}
budget: {trials: 6}
"""

ONE_TRIAL_CRASHES = """
import sys
from tuner import cli, folds
class Task(folds.TrialTask):
    def run(self, config, device, resume, report):
        if config.learning_rate == 0.75:
            raise RuntimeError("a bug")
        super().run(config, device, resume, report)
folds.TrialTask = Task
sys.exit(cli.main())
"""


Entries = dict[str, list[dict[str, Any]]]


def parts_of(run: Path, trial: str) -> list[tuple[Path, Entries]]:
    """What a W&B run holds by kind, one part for each time that it was begun, oldest first."""
    found = []
    for folder in [file.parent for file in files_of(run, trial)]:
        entries: Entries = {"run": [], "history": [], "summary": [], "exit": []}
        for line in inspect(folder).splitlines():
            entry = json.loads(line)
            if entry["type"] in entries:
                entries[entry["type"]].append(entry[entry["type"]])
        found.append((folder, entries))
    return found


def check_run(run: Path, record: dict[str, Any]) -> list[str]:
    """W&B has what the record has, each epoch once and in order, over all parts of its run. The pictures in it."""
    parts = parts_of(run, record["trial"])
    assert parts, record["trial"]
    rows = [row["item"] for _, part in parts for row in part["history"]]
    assert [row["epoch"] for row in rows] == [row["_step"] for row in rows]
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in record["history"]]
    for row, figures in zip(rows, record["history"], strict=True):
        logged = {chart_name(name): value for name, value in figures.items() if value is not None}
        assert {name: row.get(name) for name in logged} == logged
    last = parts[-1][1]
    described = last["run"][0]
    assert (described["run_id"], described["run_group"], described["job_type"]) == (record["trial"], "small", "trial")
    config = {name: value for name, value in described["config"]["update"].items() if name != "_wandb"}
    assert config == record["config"] | record["params"]
    assert last["exit"][-1].get("exit_code", 0) == (record["status"] in ("failed", "diverged"))
    summary: dict[str, Any] = {}
    for _, part in parts:
        for change in part["summary"]:
            summary |= change["update"]
    assert summary["status"] == record["status"]
    assert summary.get("reason") == record["reason"]
    if record["value"] is not None:
        assert summary["best/value"] == record["value"]
        assert summary["best/epoch"] == record["best_epoch"]
    pictures = []
    for folder, part in parts:
        for row in part["history"]:
            paths = [
                path for name, path in row["item"].items() if name.startswith("preview/") and name.endswith(".path")
            ]
            pictures += [path for path in paths if (folder / "files" / path).stat().st_size]
    return pictures


def test_six_trials_are_read_back_whole(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "set", count=32, height=64, width=128)
    (tmp_path / "small.yaml").write_text(SPACE)
    done = subprocess.run(
        [sys.executable, "-c", ONE_TRIAL_CRASHES, "search", "small.yaml", "--data", "set", "--concurrent", "1"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/small"
    records = list(kills.records(run).values())
    assert len([record for record in records if not record["replayed_from"]]) == 6
    assert {record["status"] for record in records} == {"completed", "stopped_early", "diverged", "failed"}
    for record in records:
        pictures = check_run(run, record)
        assert bool(pictures) == bool(record["history"] and not record["replayed_from"])
    [(_, report)] = parts_of(run, report_run(runs.load(run).info["id"]))
    assert (report["run"][0]["run_group"], report["run"][0]["job_type"]) == ("small", "report")


@pytest.mark.parametrize("seed", range(2))
def test_histories_are_whole_after_kills(tmp_path: Path, seed: int) -> None:
    """Of the driver, of a worker or of both, at random."""
    random.seed(seed)
    hit, wrong = kills.one_run(tmp_path, kills=2, wandb="offline")
    assert hit
    assert not wrong, (tmp_path / "stderr.txt").read_text()
    run = tmp_path / "runs/small"
    for record in kills.records(run).values():
        check_run(run, record)
