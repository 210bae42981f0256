"""`tuner search --profile` and `tuner trial --profile` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_main_job import call, place  # noqa: F401
from tests.tuner.test_tracing import PARTS, marks
from tuner import tracing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


def test_a_search_leaves_a_trace_of_its_first_trial(place: Path) -> None:  # noqa: F811
    store = place / "store"
    asked = ("--data", "set", "--trials", "1", "--wandb", "off", "--no-report", "--storage", str(store), "--profile")
    code, _, said = call(place, "search", "small.yaml", *asked)
    assert code == 0, said
    folder = place / "runs/small/profile"
    assert sorted(path.name for path in folder.iterdir()) == [tracing.SUMMARY, tracing.TRACE]
    [record] = [json.loads(line) for line in (place / "runs/small/records.jsonl").read_text().splitlines()]
    summary = (folder / tracing.SUMMARY).read_text()
    assert summary.startswith(f"trial {record['trial']}, epoch 2 on ")
    assert marks((folder / tracing.TRACE).read_bytes()).keys() >= PARTS
    assert (store / "small/profile" / tracing.SUMMARY).read_text() == summary
    assert not list(place.glob("runs/small/trials/**/profile"))


def test_a_trial_outside_any_search_keeps_its_own_trace(place: Path) -> None:  # noqa: F811
    code, _, said = call(place, "trial", "small.yaml", "--data", "set", "--wandb", "off", "--profile")
    assert code == 0, said
    [summary] = place.glob("runs/small-trials/trials/attempt-1/*-0000/profile/summary.txt")
    assert marks((summary.parent / tracing.TRACE).read_bytes()).keys() >= PARTS
