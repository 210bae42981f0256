"""A search that logs online, to a stub of W&B's server on loopback that answers, refuses, hangs or goes away."""

import base64
import logging
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.tuner.report.conftest import write_run
from tests.tuner.tracking import test_sync as syncing
from tests.tuner.tracking import test_wandb_runs as offline
from tests.tuner.tracking.pages_server import PagesServer
from tuner import pipeline, report, space_file
from tuner import run as runs
from tuner.tracking import Trackers, WandbTracker, log_report

KEY = offline.KEY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

no_network_and_no_home = offline.no_network_and_no_home
server = syncing.server
bare = syncing.bare
empty = syncing.empty


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch) -> None:
    """wandb's own settings, which ours leave to the user: the tests wait for each."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")


@pytest.fixture(scope="module")
def report_files(tmp_path_factory) -> Path:
    """A run directory with a report, and a model."""
    directory = tmp_path_factory.mktemp("reported") / "walls"
    write_run(directory)
    report.write(directory)
    best = directory / "best"
    best.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json", "thresholds.json"):
        (best / name).write_bytes(f"the winner's {name}".encode())
    return directory


def begin(directory: Path, wait_s: float = 60.0, has_sweep: bool = True) -> tuple[Trackers, WandbTracker]:
    tracker = WandbTracker("online", wait_s=wait_s)
    trackers = Trackers([tracker])
    watched = pipeline.watched(runs.load(directory))
    trackers.search_started(watched if has_sweep else replace(watched, space={}))
    return trackers, tracker


def search(trackers: Trackers, directory: Path, trials: int = 2) -> None:
    """Each trial has two epochs and completes."""
    for trial in range(trials):
        offline.start(trackers, trial)
        for number in (1, 2):
            offline.epoch(trackers, trial, number, 0.1 * number, crack=offline.png())
        record = syncing.record(trial, 2)
        trackers.trial_ended(record)
        syncing.keep(directory, record)


def warnings(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]


def arrived(server: PagesServer) -> dict[str, dict[int, int]]:
    """Of each run the epochs by their steps: a row that comes twice has the same step."""
    return {name: {row["_step"]: row["epoch"] for row in run.rows} for name, run in server.runs.items()}


WHOLE = {f"3fa91c-000{trial}": {1: 1, 2: 2} for trial in (0, 1)}


def test_runs_arrive_with_group_sweep_and_pictures(empty, server, caplog, capsys) -> None:
    trackers, tracker = begin(empty)
    search(trackers, empty)
    arguments = [Path(f"/proc/{pid}/cmdline").read_text() for pid in (tracker.pid, *offline.children(tracker.pid))]
    trackers.search_ended("finished")
    assert warnings(caplog) == []
    assert arrived(server) == WHOLE
    for name, run in server.runs.items():
        described = run.described
        assert (described["groupName"], described["jobType"], described["sweep"]) == ("cracks", "trial", "sweep0")
        assert (described["displayName"], run.exit_code, run.summary["status"]) == (name, 0, "completed")
        assert any(file.startswith("media/images/preview/crack") for file in run.files)
    (made,) = server.sweeps["sweep0"]["mutations"]
    assert made["priorRunsFilters"] is None
    command = yaml.safe_load(made["config"])["command"]
    assert space_file.load(command[2]) == runs.load(empty).space
    assert [view["displayName"] for view in server.views] == ["cracks", "Search cracks"]

    assert server.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    assert arguments
    assert not any(KEY in line for line in arguments)
    assert not [path for path, content in syncing.files(empty).items() if KEY.encode() in content]

    assert syncing.sync(empty) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 already there, 3 made"
    assert arrived(server) == WHOLE
    assert len(server.sweeps) == 1


def test_a_search_that_goes_on_goes_on_in_its_runs_and_its_sweep(empty, server, caplog) -> None:
    trackers, _ = begin(empty)
    offline.start(trackers, 0)
    offline.epoch(trackers, 0, 1, 0.1)
    trackers.search_ended("stopped")
    assert server.runs["3fa91c-0000"].exit_code == 255
    trackers, _ = begin(empty)
    offline.start(trackers, 0, offline.history_of(0.1, 0.2))  # the second was never told
    offline.epoch(trackers, 0, 3, 0.3)
    trackers.trial_ended(syncing.record(0, 3))
    trackers.search_ended("finished")
    assert [row["epoch"] for row in server.runs["3fa91c-0000"].rows] == [1, 2, 3]
    assert server.runs["3fa91c-0000"].exit_code == 0
    assert server.runs["3fa91c-0000"].described["tags"] == ["completed"]
    assert (len(server.sweeps), len(server.views)) == (1, 2)
    assert warnings(caplog) == []


@pytest.mark.parametrize("status", [401, 403, 500, 0, -1], ids=["401", "403", "500", "hangs up", "hangs"])
def test_a_server_that_takes_nothing_costs_nothing(empty, server, caplog, capsys, status) -> None:
    """The search ends as if nothing were; what the server did not take comes later, in the runs that it belongs to."""
    over = threading.Event()

    def refuse(path: str, body: bytes) -> int:
        if status == -1:
            over.wait(100)
            return 0
        return status

    good, server.status = server.status, refuse
    trackers, tracker = begin(empty, wait_s=0.5, has_sweep=status != -1)  # a server that hangs costs it 25 s
    search(trackers, empty)
    trackers.search_ended("finished")
    offline.until(lambda: tracker._process.poll() is not None, "the end of the logger process")
    assert tracker._process.returncode == 0
    tracker._tell_log()
    assert server.runs == {}
    said = warnings(caplog)
    assert any("no way online, so from here on W&B is kept for `tuner sync" in line for line in said)
    assert not any(KEY in line for line in said)
    over.set()
    server.status = good
    assert syncing.sync(empty) == 0
    assert arrived(server) == WHOLE
    assert "completed from the records" not in capsys.readouterr().out
    (made,) = server.sweeps["sweep0"]["mutations"]
    assert made["priorRunsFilters"].count("3fa91c") == 2


@pytest.mark.parametrize("status", [401, 500, 0, -1], ids=["401", "500", "hangs up", "hangs"])
def test_a_server_that_goes_away_half_way(empty, server, caplog, capsys, status) -> None:
    broken, over = threading.Event(), threading.Event()

    def answer(path: str, body: bytes) -> int:
        if not broken.is_set():
            return 200
        if status == -1:
            over.wait(100)
            return 0
        return status

    server.status = answer
    trackers, tracker = begin(empty)
    offline.start(trackers, 0)
    offline.epoch(trackers, 0, 1, 0.1)
    offline.until(lambda: "3fa91c-0000" in server.runs, "the run")
    broken.set()
    offline.epoch(trackers, 0, 2, 0.2)
    record = syncing.record(0, 2)
    trackers.trial_ended(record)
    syncing.keep(empty, record)
    offline.start(trackers, 1)
    for number in (1, 2):
        offline.epoch(trackers, 1, number, 0.1 * number)
    record = syncing.record(1, 2)
    trackers.trial_ended(record)
    syncing.keep(empty, record)
    trackers.search_ended("finished")
    assert tracker._process.returncode == 0
    said = "\n".join(warnings(caplog))
    assert "not wholly uploaded: 3fa91c-0000; nothing is lost for good" in said
    over.set()
    broken.clear()
    assert syncing.sync(empty) == 0
    assert arrived(server) == WHOLE
    assert {name: run.exit_code for name, run in server.runs.items()} == dict.fromkeys(WHOLE, 0)
    assert "completed from the records" not in capsys.readouterr().out


def test_what_a_server_missed_comes_before_what_it_would_take(empty, server, caplog) -> None:
    """A session without a server, then one with: uploaded later, the first part would have the last word."""
    good, server.status = server.status, lambda path, body: 500
    trackers, _ = begin(empty)
    offline.start(trackers, 0)
    for number in (1, 2):
        offline.epoch(trackers, 0, number, 0.1 * number)
    trackers.search_ended("stopped")
    server.status = good
    caplog.clear()
    trackers, _ = begin(empty)
    offline.start(trackers, 0, offline.history_of(0.1, 0.2))
    offline.epoch(trackers, 0, 3, 0.3)
    record = syncing.record(0, 3)
    trackers.trial_ended(record)
    syncing.keep(empty, record)
    offline.start(trackers, 1)
    offline.epoch(trackers, 1, 1, 0.1)
    record = syncing.record(1, 1)
    trackers.trial_ended(record)
    syncing.keep(empty, record)
    trackers.search_ended("finished")
    assert any("not wholly uploaded: 3fa91c-0000; nothing is lost" in line for line in warnings(caplog))
    assert list(server.runs) == ["3fa91c-0001"]
    assert syncing.sync(empty) == 0
    run = server.runs["3fa91c-0000"]
    assert [row["epoch"] for row in run.rows] == [1, 2, 3]
    assert (run.exit_code, run.summary["status"], run.described["tags"]) == (0, "completed", ["completed"])


def report_files_in(directory: Path, report_files: Path) -> None:
    for name in ("report", "best", "records.jsonl"):
        source = report_files / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, directory / name)


@pytest.mark.parametrize("harm", ["moved", "torn", "refused", "files refused", "never begun"])
def test_a_report_that_is_not_wholly_there_is_logged_anew(empty, server, capsys, report_files, harm) -> None:
    report_files_in(empty, report_files)
    (empty / "records.jsonl").unlink()  # of another run
    (empty / "records.jsonl").touch()
    good = server.status
    if harm != "never begun":
        log_report(pipeline.watched(runs.load(empty)), "offline", 60.0)
        (file,) = empty.rglob("run-3fa91c-report.wandb")
    if harm == "moved":
        empty = empty.rename(empty.with_name("elsewhere"))
    elif harm == "torn":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm.endswith("refused"):
        refused = re.compile(rb"mutation CreateArtifact\b" if harm == "refused" else rb"^/artifact/")
        server.status = lambda path, body: 403 if refused.search(path.encode() + body) else 200
        assert syncing.sync(empty) == 1
        assert re.search("failed to log artifact|file transfer", capsys.readouterr().out)
        server.status = good
    assert syncing.sync(empty) == 0
    assert {artifact.kind for artifact in server.artifacts if artifact.committed} == {"run_table", "model", "report"}
    count = len(server.artifacts)
    assert syncing.sync(empty) == 0
    assert len(server.artifacts) == count


def test_the_report_has_a_run_with_tables_figures_and_artifacts(empty, server, caplog, report_files) -> None:
    report_files_in(empty, report_files)
    watched = pipeline.watched(runs.load(empty))
    log_report(watched, "online", 60.0)
    assert warnings(caplog) == []
    run = server.runs["3fa91c-report"]
    assert (run.described["jobType"], run.described["groupName"]) == ("report", "cracks")
    assert run.described.get("sweep") is None
    artifacts = {artifact.kind: artifact for artifact in server.artifacts if artifact.kind != "run_table"}
    assert all(artifact.committed for artifact in server.artifacts)
    assert {"model.safetensors", "config.json", "thresholds.json"} < set(artifacts["model"].files)
    best = empty / "best" / "model.safetensors"
    assert artifacts["model"].files["model.safetensors"] == best.read_bytes()
    assert {"index.html", "metrics.json", "predictions.csv"} < set(artifacts["report"].files)
    count = len(server.requests)
    log_report(watched, "online", 60.0)  # once
    assert len(server.requests) == count
