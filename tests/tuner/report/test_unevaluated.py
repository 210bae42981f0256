"""Reports on searches whose winner was not evaluated: stopped, running, failed, or without any completed trial."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuner import report


@pytest.fixture
def unevaluated(usual, tmp_path: Path) -> Path:
    """The usual run before its finals."""
    for name in ("run.json", "records.jsonl"):
        shutil.copy(usual.directory / name, tmp_path)
    return tmp_path


def change(directory: Path, **facts: Any) -> None:
    path = directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def keep(directory: Path, *statuses: str) -> list[dict[str, Any]]:
    path = directory / "records.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["status"] in statuses]
    path.write_text("".join(f"{line}\n" for line in kept))
    return [json.loads(line) for line in kept]


def written(directory: Path) -> tuple[str, dict[str, Any]]:
    folder = report.write(directory).parent
    assert not (folder / "predictions.csv").exists()
    text = (folder / "report.md").read_text()
    assert "None" not in text
    assert "nan" not in text.split()
    for name in (folder / "figures").iterdir():
        assert f"figures/{name.name}" in text
    return text, json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("stopped", "The search was stopped; \\`tuner resume\\` goes on with it. Best so far is trial abc123-0001"),
        ("running", "it runs, or it was killed, and \\`tuner resume\\` goes on"),
        ("failed", "The search failed; why stands under Search."),
        ("finished", "its winner is not evaluated yet; \\`tuner finals\\` does it."),
    ],
)
def test_the_search_is_told_and_nothing_of_test(unevaluated: Path, state: str, said: str) -> None:
    change(unevaluated, state=state)
    text, metrics = written(unevaluated)
    assert said in text
    assert "nothing has been seen of test" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        *("## Data", "## Run parameters", "## Training", "## How far the winner can be trusted", "## Search"),
        "## Where it comes from",
    ]
    assert (metrics["state"], metrics["evaluated"], metrics["best"]["trial"]) == (state, False, "abc123-0001")
    records = [json.loads(line) for line in (unevaluated / "records.jsonl").read_text().splitlines()]
    best = max((r for r in records if r["status"] == "completed"), key=lambda r: r["value"])
    epoch = best["history"][best["best_epoch"] - 1]
    assert metrics["validation"] | {"dice_mean": best["value"], "iou_mean": epoch["iou_mean"]} == metrics["validation"]
    assert metrics["validation"]["threshold_rule"] == best["thresholds"]["rule"]
    for figures in (metrics["test"], metrics["baseline"]):
        assert figures.pop("ci95") == {}
        assert set(figures.values()) == {None}
    assert metrics["search"]["trials"] == len(records)


def test_nothing_has_completed(unevaluated: Path) -> None:
    change(unevaluated, state="failed")
    keep(unevaluated, "failed", "diverged")
    text, metrics = written(unevaluated)
    assert text.startswith("# cracks &lt;i&gt;: 2 trials, none evaluated")
    assert "No trial has completed, so there is no best configuration yet. The search failed;" in text
    assert "tried to allocate &lt;2 GiB&gt;" in text
    assert "loss is not finite in epoch 2" in text
    assert metrics["best"] is None
    assert set(metrics["validation"].values()) == {None}


def test_every_trial_failed(unevaluated: Path) -> None:
    keep(unevaluated, "failed")
    text, _ = written(unevaluated)
    assert "No trial has completed, so there is no best configuration, and nothing to evaluate." in text


def test_only_trials_that_were_stopped_early(unevaluated: Path) -> None:
    keep(unevaluated, "stopped_early")
    text, metrics = written(unevaluated)
    assert "there is no best configuration" in text
    assert metrics["search"]["stopped_early"] == 2


def test_a_broken_importance_is_named_and_a_stale_one_is_not_shown(unevaluated: Path) -> None:
    path = unevaluated / "importance.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"importance\.json is broken .* `tuner resume .*` writes it again"):
        report.write(unevaluated)
    one = {"name": "dilate", "importance": 1.0, "ci90": [0.9, 1.0], "chance": 0.1}
    path.write_text(
        json.dumps({"metric": "dice_mean", "epoch": 5, "trials": 12, "best": 5, "parameters": [one], "records": 12})
    )
    text, _ = written(unevaluated)
    assert "importance.json was written of 12 records, and there are 8" in text
    assert "Parameters that mattered" not in text


def test_nothing_has_finished_yet(unevaluated: Path) -> None:
    change(unevaluated, state="running")
    (unevaluated / "records.jsonl").unlink()
    text, metrics = written(unevaluated)
    assert "The run directory holds no records of trials." in text
    assert metrics["search"]["trials"] == 0


def test_what_misses_its_constraints_is_called_so(make_run, tmp_path: Path) -> None:
    directory, _ = make_run(tests=6, recall_beyond=[0.25, 0.125, *[0.5] * 6])
    shutil.rmtree(directory / "evaluation")
    text, _ = written(directory)
    assert "No completed trial meets the constraints; it comes nearest: recall 0.125 beyond its bound." in text


def test_an_evaluation_that_was_cut_short_is_told(unevaluated: Path, usual) -> None:
    (unevaluated / "evaluation").mkdir()
    shutil.copy(usual.directory / "evaluation/openings.jsonl", unevaluated / "evaluation")
    text, metrics = written(unevaluated)
    assert "an evaluation on test was begun, and cut short" in text
    assert metrics["test_openings"] == 1


def test_the_finals_turn_it_into_the_whole_report(unevaluated: Path, usual) -> None:
    report.write(unevaluated)
    shutil.copytree(usual.directory / "evaluation", unevaluated / "evaluation")
    folder = report.write(unevaluated).parent
    assert (folder / "metrics.json").read_bytes() == (usual.report / "metrics.json").read_bytes()


def test_another_machine_needs_neither_torch_nor_the_images(usual, tmp_path: Path) -> None:
    """In a process in which importing what only trains fails; evaluation/, run.json and records.jsonl are enough."""
    for name in ("run.json", "records.jsonl"):
        shutil.copy(usual.directory / name, tmp_path)
    shutil.copytree(usual.directory / "evaluation", tmp_path / "evaluation")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray", "optuna", "wandb", "albumentations", "skimage", "onnx"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import tuner.cli, tuner.run  # `tuner report` imports no more
from pathlib import Path
from tuner import report
report.write(Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report/metrics.json").read_bytes() == (usual.report / "metrics.json").read_bytes()
    assert (tmp_path / "report/index.html").read_bytes() == (usual.report / "index.html").read_bytes()


def test_there_is_no_winner_before_the_evaluation(unevaluated: Path) -> None:
    path = unevaluated / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["replayed_from"] = "abc123-0004"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = written(unevaluated)[0].split("\n## Training\n")[1].split("\n## ")[0]
    assert "The best trial is the network of trial abc123-0004, judged in another way" in training
    assert "winner" not in training
