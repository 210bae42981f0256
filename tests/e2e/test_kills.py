"""A few of the runs of bench/kills.py: real searches that are killed at random moments and resumed."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import kills
from tests import s3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "study"), [(1, None), (2, "sqlite:///study.db"), (3, None)])
def test_a_search_that_is_killed_at_random_loses_nothing(tmp_path: Path, seed: int, study: str | None) -> None:
    random.seed(seed)
    hit, wrong = kills.one_run(tmp_path, kills=2, study=study)
    assert hit
    assert not wrong, (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nor_does_one_whose_machine_is_gone_and_whose_storage_is_there(tmp_path: Path) -> None:
    random.seed(4)
    with s3.serving():
        hit, wrong = kills.one_run(tmp_path, kills=3, storage="s3://bucket/kills")
    assert any("machine" in one for one in hit)
    assert not wrong, (tmp_path / "stderr.txt").read_text()


def scripted(monkeypatch, *sessions: tuple[int, dict[str, list[str]]]) -> None:
    """Commands that write trials as records into folders, with a run.json, and end so; the last one again and again."""
    left = list(sessions)

    def command(place: Path, *arguments: str) -> subprocess.Popen[bytes]:
        status, written = left.pop(0) if len(left) > 1 else left[0]
        for folder, trials in written.items():
            (place / folder).mkdir(parents=True, exist_ok=True)
            (place / folder / "run.json").write_text("{}")
            rows = [{"trial": trial, "status": "completed"} for trial in trials]
            (place / folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"], start_new_session=True)

    monkeypatch.setattr(kills, "tuner", command)
    monkeypatch.setattr(kills, "problems", lambda run: [])


def test_what_ends_with_a_failure_each_time_is_not_resumed_for_ever(tmp_path: Path, monkeypatch) -> None:
    scripted(monkeypatch, (1, {"runs/small": []}))
    assert kills.one_run(tmp_path, kills=1) == ([], ["it ended with a failure each time"])


@pytest.mark.parametrize(("later", "wrong"), [(["a"], []), (["b"], ["changed after its end: a"])])
def test_what_a_storage_held_when_the_machine_was_lost_must_stay(
    tmp_path: Path, monkeypatch, later: list[str], wrong: list[str]
) -> None:
    held = {"runs/small": ["a", "not mirrored yet"], "there/small": ["a"]}
    scripted(monkeypatch, (1, held), (0, {"runs/small": later}))
    assert kills.one_run(tmp_path, kills=0, storage=str(tmp_path / "there")) == (["machine"], wrong)
