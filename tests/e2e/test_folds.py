"""A search with cross-validation as a user runs it: small, but nothing is faked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model import folds, synthetic
from model.data import cached
from tests.e2e.test_main_job import call, call_here
from tuner import nested, records, space_file
from tuner import run as runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

SPACE = """
name: small
data: {height: 64, width: 128, validation_share: 0.25, test_share: 0.25}
train: {width: 0.1, epochs: 2, precision: float32, augment_flips: true}
search:
  learning_rate:  {type: float, low: 1.5, high: 2.5}
  threshold_rule: {type: categorical, choices: [pr_curve, grid]}
objective: {metric: iou_mean}
cross_validation: {folds: 3, nested: true}
scheduler: {name: asha, min_epochs: 1, reduction: 2}
budget: {trials: 6}
seed: 1
"""


def test_a_search_with_folds_from_the_space_to_the_model(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "set", count=40, height=64, width=128)
    (tmp_path / "small.yaml").write_text(SPACE)
    code, _, err = call(tmp_path, "search", "small.yaml", "--data", "set", "--concurrent", "2")
    assert code == 0, err
    place = tmp_path / "runs/small"
    found = records.read(place)
    baseline = records.baseline(found)
    assert baseline is not None
    assert (baseline["status"], len(baseline["folds"])) == ("completed", 3)
    early = [r for r in found if r["reason"] == "not among the best at fold 1"]
    assert early  # of 5 at most 2 went on
    assert all(r["status"] == "stopped_early" and len(r["folds"]) == len(r["history"]) == 1 for r in early)

    # Winner and baseline, each on the fold that judged its network, which no other cache was made for.
    selection = json.loads((place / "evaluation/selection.json").read_text())
    run = runs.load(place)
    splits = run.splits()
    pool = folds.pool(splits)
    assert run.space.cross_validation is not None
    dealt = folds.deal(pool, run.space.cross_validation, run.space.seed)
    assert selection["winner"] != selection["baseline"] == baseline["trial"]
    for role in ("winner", "baseline"):
        chosen = selection["trials"][selection[role]]
        with np.load(place / f"evaluation/{role}-validation.npz", allow_pickle=False) as arrays:
            assert arrays["names"].tolist() == [pool[row].name for row in dealt[chosen["fold"] - 1].validation]
    assert len(cached(tmp_path / "cache")) == 2  # the pool and, at the end, test

    metrics = json.loads((place / "report/metrics.json").read_text())
    assert metrics["nested"] == json.loads(json.dumps(nested.score(found)))
    assert metrics["validation"]["iou_mean"] == pytest.approx(
        next(r for r in found if r["trial"] == selection["winner"])["folds"][
            selection["trials"][selection["winner"]]["fold"] - 1
        ]["value"],
        abs=1e-9,
    )
    page = (place / "report/report.md").read_text()
    assert "For each fold the trial that is best without it" in page
    assert "The folds of trial" in page
    assert space_file.load(tmp_path / "small.yaml").fingerprint() == run.space.fingerprint()

    code, out, err = call_here(tmp_path, "report", "runs/small")
    assert code == 0, err
    code, out, err = call_here(tmp_path, "status", "runs/small")
    assert code == 0, err
    assert "not among the best at fold 1" in out

    # One trial alone gives the same, and leaves its model.
    best = max(
        (r for r in found if r["status"] == "completed" and not r["replayed_from"] and not r["baseline"]),
        key=lambda r: r["value"],
    )
    words = [f"--set={name}={value}" for name, value in best["params"].items()]
    code, out, err = call_here(tmp_path, "trial", "small.yaml", "--data", "set", "--name", "alone", *words)
    assert code == 0, err
    (alone,) = records.read(tmp_path / "runs/alone")
    assert [fold["value"] for fold in alone["folds"]] == [fold["value"] for fold in best["folds"]]
    assert "over 3 folds" in out
    assert (Path(out.split("model in ")[1].strip()) / "model.safetensors").is_file() or (
        tmp_path / out.split("model in ")[1].strip() / "model.safetensors"
    ).is_file()
