"""The command of a report that trains the winner alone, run as it stands there."""

import json
import shlex
from pathlib import Path

import pytest

from model import synthetic
from tests.tuner.conftest import small_space
from tuner import cli, importance, records
from tuner.pipeline import run_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_winner_trained_alone_gives_the_same_to_the_bit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "a set", count=24, height=64, width=128)
    search = {
        "learning_rate": {"type": "float", "low": 0.1, "high": 2.0, "log": True},
        "augment_flips": {"type": "categorical", "choices": [True, False]},
        "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
        "threshold_factor": {"type": "int", "low": 1, "high": 3, "when": {"threshold_rule": "pr_curve"}},
    }
    space = small_space(search=search, budget={"trials": 3}, sampler="random", seed=3)
    run = run_search(space, tmp_path / "a set", runs=tmp_path / "runs", wandb="off", concurrent=1)
    text = (run.directory / "report" / "report.md").read_text()
    assert json.loads((run.directory / importance.FILE).read_text()) == importance.of(space, run.records)

    code = text[text.index("The search space in full") :].split("\n\n", 1)[1]
    Path("space.yaml").write_text("\n".join(line[4:] for line in code.splitlines()))
    (command,) = [line.strip() for line in text.splitlines() if line.startswith("    tuner trial ")]
    assert cli.main([*shlex.split(command)[1:], "--wandb", "off", "--name", "again"]) == 0
    (again,) = records.read(Path("runs/again"))
    best = run.best
    assert best is not None
    for key in ("params", "config", "value", "best_epoch", "thresholds"):
        assert again[key] == best[key], key
    losses = [[row["loss_total"] for row in record["history"]] for record in (again, best)]
    assert losses[0] == losses[1]
