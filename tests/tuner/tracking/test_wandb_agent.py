"""A real `wandb agent` drives `tuner trial`, with a stub of W&B's server on loopback that hands out the runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import synthetic
from tests.tuner.conftest import small_space
from tests.tuner.tracking.stub_server import StubServer
from tuner import run as runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "0123456789abcdef0123456789abcdef01234567"
SEARCH = {
    "learning_rate": {"type": "float", "low": 0.1, "high": 2.0, "log": True},
    "augment_flips": {"type": "categorical", "choices": [True, False]},
    "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
    "threshold_factor": {"type": "int", "low": 1, "high": 3, "when": {"threshold_rule": "pr_curve"}},
}


class SweepServer(StubServer):
    """A server with one sweep, as much of one as `wandb agent` of 0.31 asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.waiting: list[dict[str, Any]] = []
        """commands for the agent, handed out one by one"""
        self.agents: list[dict[str, Any]] = []
        self.reports: list[dict[str, bool]] = []
        """what the agent says of its runs at each heartbeat"""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        asked = json.loads(body) if path == "/graphql" else {}
        # wandb-core names no operation where it passes on a query of the Python side, and leaves out what is empty.
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        answer = getattr(self, f"sweeps_{name[1]}", None) if name else None
        return {"data": answer(asked.get("variables") or {})} if answer else super().answer(path, body)

    def sweeps_Viewer(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - as W&B calls it
        me = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": me}

    def sweeps_SweepWithRuns(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nothing = dict.fromkeys(("description", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler"))
        sweep = {
            "id": "s",
            "name": asked["sweep"],
            "method": "random",
            "state": "RUNNING",
            "earlyStopJobRunning": False,
        }
        described = {"config": yaml.safe_dump(self.config), "createdAt": "2026-01-01T00:00:00", "runs": {"edges": []}}
        return {"project": {"sweep": nothing | sweep | described}}

    def sweeps_CreateAgent(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.agents.append(asked)
        return {"createAgent": {"agent": {"id": "agent1"}}}

    def sweeps_Heartbeat(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.reports.append(json.loads(asked["runState"]))
        commands: list[dict[str, Any]] = []
        if not self.reports[-1]:  # nothing runs there
            commands = [self.waiting.pop(0)] if self.waiting else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": asked["id"]}, "commands": json.dumps(commands)}}


def handed_out(run_id: str, **params: Any) -> dict[str, Any]:
    return {"type": "run", "run_id": run_id, "program": "tuner", "args": {k: {"value": v} for k, v in params.items()}}


@pytest.fixture
def server() -> Iterator[SweepServer]:
    with SweepServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    synthetic.write(tmp_path / "set", count=24, height=64, width=128)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_space(search=SEARCH).to_dict()))
    return tmp_path


def run_agent(server: SweepServer, place: Path, **more: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    variables = {
        "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false", "HOME": str(place),
        "TMPDIR": str(place), "SEGDEC_TUNER_CACHE": str(place / "cache"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "wandb", "agent", "me/segdec-tuner/sweep123"],
        cwd=place, env=own | variables | more, capture_output=True, text=True,
    )  # fmt: skip


def test_an_agent_runs_trials_and_their_records_arrive_in_the_collection(server: SweepServer, place: Path) -> None:
    """A third one, which no trial can be, ends with a failure that the agent survives."""
    server.config = {
        "command": [
            sys.executable, "-m", "tuner", "trial", "small.yaml", "--data", "set", "--wandb", "offline", "--set",
            "${args_no_hyphens}",
        ]
    }  # fmt: skip
    server.waiting = [
        handed_out("first1", learning_rate=1, augment_flips=False, threshold_rule="grid", threshold_factor=2),
        handed_out("wrong1", learning_rate=3, augment_flips=False, threshold_rule="grid", threshold_factor=2),
        handed_out("second1", learning_rate=0.25, augment_flips=True, threshold_rule="pr_curve", threshold_factor=3.0),
    ]
    done = run_agent(server, place)
    assert done.returncode == 0, done.stderr
    assert [agent["sweep"] for agent in server.agents] == ["sweep123"]
    run = runs.load(place / "runs/small-trials")
    assert [(record["status"], record["params"]) for record in run.records] == [
        ("completed", {"learning_rate": 1.0, "augment_flips": False, "threshold_rule": "grid"}),
        (
            "completed",
            {"learning_rate": 0.25, "augment_flips": True, "threshold_rule": "pr_curve", "threshold_factor": 3},
        ),
    ]
    assert "tuner trial: --set: 1 problem:\n  learning_rate: must be a number from 0.1 to 2, found '3'" in done.stderr
    assert done.stderr.count("left out, for their conditions are not met: threshold_factor") == 1
    assert all(f"{record['trial']} completed: dice_mean" in done.stdout for record in run.records)
    assert not any(KEY.encode() in path.read_bytes() for path in run.directory.rglob("*") if path.is_file())


def test_a_trial_of_an_agent_is_the_run_that_the_agent_knows(server: SweepServer, place: Path) -> None:
    """Online, which is the default there: under the agent's id and in its sweep, beside trials of its own search."""
    server.config = {
        "command": [
            sys.executable, "-m", "tuner", "trial", "small.yaml", "--data", "set", "--set", "${args_no_hyphens}",
        ]
    }  # fmt: skip
    point = {"learning_rate": 1, "augment_flips": False, "threshold_rule": "grid"}
    server.waiting = [handed_out("first1", **point), handed_out("second1", **point | {"learning_rate": 0.5})]
    done = run_agent(server, place)
    assert done.returncode == 0, done.stderr
    assert list(server.runs) == ["first1", "second1"]
    records = runs.load(place / "runs/small-trials").records
    for name, record in zip(server.runs, records, strict=True):
        run = server.runs[name]
        described = run.described
        assert (described["sweep"], described["displayName"]) == ("sweep123", record["trial"])
        assert (described["groupName"], described["jobType"]) == ("small-trials", "trial")
        assert json.loads(described["config"])["learning_rate"]["value"] == record["params"]["learning_rate"]
        assert [row["val/objective"] for row in run.rows] == [row["value"] for row in record["history"]]
        assert (run.exit_code, run.summary["best/value"]) == (0, record["value"])
