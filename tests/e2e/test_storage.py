"""Searches whose run lies at a real S3 server: it fails for a while, the driver is killed, another machine goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench import kills
from model import synthetic
from tests import s3
from tests.e2e.test_main_job import SPACE, call, environment
from tuner.remote import Folder

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

SCRIPTED = """
name: small
data: {height: 64, width: 128, validation_share: 0.25, test_share: 0.25}
train: {width: 0.1, epochs: 4, learning_rate: 1.0}
search: {delta_cls_loss: {type: float, low: 0.001, high: 10.0}}
start_from: [{delta_cls_loss: 1.0}, {delta_cls_loss: 2.0}, {delta_cls_loss: 3.0}]
objective: {metric: dice_mean}
budget: {trials: 4}
"""
DELTAS = ("0.01", "1", "2", "3")
URI = "s3://bucket/runs"


@pytest.fixture
def wire() -> Iterator[s3.Wire]:
    with s3.serving() as found:
        yield found


@pytest.fixture
def place(tmp_path: Path, wire: s3.Wire) -> Path:
    synthetic.write(tmp_path / "set", count=32, height=64, width=128)
    (tmp_path / "small.yaml").write_text(SCRIPTED)
    return tmp_path


def start(place: Path, folder: Path, *arguments: str, **behaviour: str) -> subprocess.Popen[bytes]:
    """The command with scripted trials, in a session of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "behaviour.json").write_text(json.dumps({name.lstrip("_"): does for name, does in behaviour.items()}))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.scripted", str(folder), *arguments],
        cwd=place,
        env=environment(place) | {"PYTHONPATH": str(ROOT)},
        stdout=(folder / "out.txt").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def search(place: Path, folder: Path, **behaviour: str) -> subprocess.Popen[bytes]:
    return start(place, folder, "search", "small.yaml", "--data", "set", "--wandb", "off", "--no-report",
                 "--concurrent", "1", "--storage", f"{URI}-{folder.name}", "--runs", str(folder / "runs"), **behaviour)  # fmt: skip


def end(process: subprocess.Popen[bytes], folder: Path, code: int = 0) -> str:
    """What the command said."""
    process.wait(240)
    assert process.returncode == code, said(folder)
    return said(folder)


def said(folder: Path) -> str:
    """All that the commands there have said, without their line breaks."""
    return " ".join((folder / "out.txt").read_text().split())


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    while not condition():
        assert process.poll() is None, said(folder)
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The machine is gone: the driver and all that Ray started for it."""
    process.kill()
    process.wait()
    for number, _ in kills.of_session(process.pid):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def records(run: Path) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    found = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in ("trial", "started", "ended")} for one in found]


def trained(folder: Path) -> list[str]:
    return sorted((folder / "epochs.txt").read_text().splitlines())


EVERY_EPOCH_ONCE = sorted(f"{delta} {epoch}" for delta in DELTAS for epoch in range(1, 5))


def test_a_driver_that_is_killed_goes_on_from_the_storage_on_another_machine(place: Path) -> None:
    never = place / "never"
    end(search(place, never), never)

    killed = place / "killed"
    process = search(place, killed, _2="wait")
    until((killed / "waiting").exists, process, killed)  # its first epoch is done, two trials have ended
    there = Folder(f"{URI}-killed/small")
    until(lambda: len(there.read("records.jsonl").splitlines()) == 2, process, killed)
    kill(process)
    shutil.rmtree(killed / "runs")
    (killed / "go").touch()

    where = str(place / "another machine")
    heard = end(start(place, killed, "resume", there.address, "--runs", where, _2="wait"), killed)
    assert "worked on s3://bucket/runs-killed/small last; looking 50 s whether it lives" in heard
    assert records(place / "another machine/small") == records(never / "runs/small")
    assert trained(killed) == trained(never) == EVERY_EPOCH_ONCE
    assert there.read("records.jsonl") == (place / "another machine/small/records.jsonl").read_bytes()
    kept = {name.split("/")[1] for name in there.files("trials/") if name.endswith("manifest.json")}
    assert kept == {"attempt-1", "attempt-2"}
    assert not list((place / "another machine").glob("small/trials/*/*/*/manifest.json"))
    end(start(place, killed, "resume", there.address, "--runs", where), killed)  # nothing is left to do
    assert trained(killed) == EVERY_EPOCH_ONCE


@pytest.mark.parametrize("state", ["cut", "busy"])
def test_a_storage_that_fails_for_a_while_costs_nothing(place: Path, wire: s3.Wire, state: str) -> None:
    folder = place / "outage"
    process = search(place, folder, _1="wait")
    until((folder / "waiting").exists, process, folder)
    wire.fail(state)
    (folder / "go").touch()  # three epochs without a checkpoint, and an end that must have one
    until(lambda: "1 4" in trained(folder), process, folder)
    until(lambda: "the search goes on" in said(folder), process, folder)
    wire.mend()
    heard = end(process, folder)
    assert heard.count("the search goes on") == heard.count("is back, and holds all that was written meanwhile") == 1
    assert [record["status"] for record in records(folder / "runs/small")] == ["completed"] * 4
    assert trained(folder) == EVERY_EPOCH_ONCE
    there = Folder(f"{URI}-outage/small")
    for name in ("study.journal", "records.jsonl", "run.json", "importance.json"):
        assert there.read(name) == (folder / "runs/small" / name).read_bytes()
    assert json.loads(there.read("owner.json"))["released"]


def test_finals_and_report_of_a_run_whose_models_lie_there(place: Path) -> None:
    (place / "small.yaml").write_text(SPACE)
    code, out, err = call(place, "search", "small.yaml", "--data", "set", "--storage", URI, "--wandb", "offline")
    assert (code, out) == (0, "runs/small/report/index.html\n"), err
    run, there = place / "runs/small", Folder(f"{URI}/small")
    assert not list(run.glob("trials/*/*/*/manifest.json"))
    assert list(run.glob("trials/*/*/*/previews/*.png"))
    assert there.read("report/index.html") == (run / "report/index.html").read_bytes()
    assert there.read("best/model.safetensors") == (run / "best/model.safetensors").read_bytes()
    assert there.files("wandb/")
    code, out, err = call(place, "status", f"{URI}/small")
    assert (code, err.count("`tuner resume s3://bucket/runs/small` brings it")) == (2, 1)
    code, out, err = call(place, "search", "small.yaml", "--data", "set", "--storage", URI, "--runs", "others")
    assert (code, "a run's name must be new, found s3://bucket/runs/small" in err) == (2, True), err
    code, out, err = call(place, "export", "runs/small", "--format", "torch")
    assert (code, "best/model.pt2" in there.files()) == (0, True), err
    code, out, err = call(place, "resume", f"{URI}/small", "--runs", "others")
    assert (code, out) == (0, "others/small/report/index.html\n"), err
    assert (place / "others/small/best/model.pt2").exists()
    code, out, err = call(place, "finals", "others/small", "--open-test")
    assert code == 0, err
    assert there.files("evaluation/open-test/")


def test_two_at_a_time_are_one_too_many(place: Path) -> None:
    folder = place / "two"
    process = search(place, folder, _1="wait")
    until((folder / "waiting").exists, process, folder)
    address = f"{URI}-two/small"
    other = place / "other"
    assert "must be worked on by one process" in end(
        start(place, other, "resume", address, "--runs", "elsewhere"), other, code=2
    )
    assert not (place / "elsewhere").exists()
    owner = json.loads(Folder(address).read("owner.json"))
    Folder(address).write("owner.json", json.dumps(owner | {"session": "x", "host": "a-head", "pid": 7}).encode())
    (folder / "go").touch()
    heard = end(process, folder, code=1)
    assert "the run went on elsewhere: process 7 on a-head works on it now" in heard
    assert json.loads((folder / "runs/small/run.json").read_text())["state"] == "stopped"
