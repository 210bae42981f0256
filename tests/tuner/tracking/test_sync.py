"""`tuner sync` with wandb's own uploader and a stub of its server on loopback."""

import base64
import fcntl
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model import synthetic
from tests.conftest import heeds_ctrl_c
from tests.tuner.conftest import small_space
from tests.tuner.tracking import test_wandb_runs as offline
from tests.tuner.tracking.pages_server import PagesServer
from tuner import cli, pipeline
from tuner import run as runs
from tuner.tracking import Trackers, WandbTracker
from tuner.tracking import sync as sync_module

KEY = offline.KEY
DIRECTORY = "cracks"

pytestmark = pytest.mark.timeout(180)

no_network_and_no_home = offline.no_network_and_no_home


@pytest.fixture
def server(monkeypatch) -> Iterator[PagesServer]:
    """Answers, and is where wandb looks; a failure is not tried for long."""
    with PagesServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for name in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER"):
            monkeypatch.setenv(f"WANDB__{name}_RETRY_MAX", "1")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The directory of a run that has not begun; only to be copied."""
    folder = tmp_path_factory.mktemp("bare")
    synthetic.write(folder / "set", count=12, height=64, width=128)
    run = runs.create(small_space(), folder / "set", folder / "runs", DIRECTORY)
    run.note(id="3fa91c")
    return run.directory


@pytest.fixture(scope="module")
def two_trials(bare, tmp_path_factory) -> Path:
    """Two trials that were logged offline; only to be copied."""
    directory = tmp_path_factory.mktemp("logged") / DIRECTORY
    shutil.copytree(bare, directory)
    log(directory, {0: [1, 2], 1: [1, 2, 3]})
    return directory


def log(directory: Path, epochs: dict[int, list[int]], ended: bool = True) -> None:
    """A session of a search, which logs these epochs of these trials."""
    tracker = WandbTracker("offline", wait_s=offline.DEADLINE_S)
    tracker.search_started(pipeline.watched(runs.load(directory)))
    for trial, numbers in epochs.items():
        before = offline.history_of(*(0.1 * n for n in range(1, numbers[0])))
        offline.start(tracker, trial, before)
        for number in numbers:
            offline.epoch(tracker, trial, number, 0.1 * number, **({"crack": offline.png()} if number == 2 else {}))
        if ended:
            found = record(trial, numbers[-1])
            tracker.trial_ended(found)
            keep(directory, found)
    tracker.search_ended("finished")


def record(trial: int, epochs: int, status: str = "completed") -> dict[str, Any]:
    history = offline.history_of(*(0.1 * n for n in range(1, epochs + 1)))
    return offline.record(trial, status, epochs=epochs, history=history)


def keep(directory: Path, found: dict[str, Any]) -> None:
    with (directory / "records.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


@pytest.fixture
def logged(two_trials, tmp_path) -> Path:
    """A run directory of its own."""
    directory = tmp_path / DIRECTORY
    shutil.copytree(two_trials, directory, symlinks=True)
    return directory


@pytest.fixture
def empty(bare, tmp_path) -> Path:
    """A run of which nothing was logged."""
    directory = tmp_path / "empty"
    shutil.copytree(bare, directory)
    return directory


def marks(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*.synced"))


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def sync(directory: Path, *options: str) -> int:
    return cli.main(["sync", str(directory), *options])


@pytest.mark.slow
def test_two_trials_arrive_once(logged, server, capsys) -> None:
    assert sync(logged) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "2 uploaded, 3 made"
    assert sorted(server.runs) == ["3fa91c-0000", "3fa91c-0001"]
    one = server.runs["3fa91c-0001"]
    assert (one.described["groupName"], one.described["project"], one.described["jobType"]) == (
        "cracks", "segdec-tuner", "trial",
    )  # fmt: skip
    assert one.described["tags"] == ["completed"]
    assert [row["epoch"] for row in one.rows] == [1, 2, 3]
    assert [row["val/dice_mean"] for row in one.rows] == pytest.approx([0.1, 0.2, 0.3])
    assert (one.summary["best/value"], one.exit_code) == (0.75, 0)
    assert any(name.startswith("media/images/preview/crack") for name in one.files)

    (sweep,) = server.sweeps["sweep0"]["mutations"]
    assert json.loads(sweep["priorRunsFilters"]) == {"$or": [{"name": "3fa91c-0000"}, {"name": "3fa91c-0001"}]}
    assert f"sweep: made: {server.url}/me/segdec-tuner/sweeps/sweep0" in said
    assert [view["displayName"] for view in server.views] == ["cracks", "Search cracks"]

    server.asked.clear()
    assert sync(logged) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 already there, 3 made"
    assert server.asked == ["Viewer", "SweepWithRuns"]

    assert server.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    assert KEY not in said
    assert not [path for path, content in files(logged).items() if KEY.encode() in content]


def test_a_run_whose_folder_was_renamed_keeps_the_name_of_its_group(logged) -> None:
    """The runs are there already, under the name that the run was made with."""
    moved = logged.rename(logged.with_name("later"))
    assert pipeline.watched(runs.load(moved)).name == DIRECTORY


@pytest.mark.parametrize(("content", "is_logged"), [
    ('{"evaluated": true}', True), ("{}", True), ('{"evaluated": false}', False), ("{", False),
])  # fmt: skip
def test_only_a_report_on_a_winner_is_logged(logged, content: str, is_logged: bool) -> None:
    (logged / "report").mkdir()
    (logged / "report/metrics.json").write_text(content)
    run = runs.load(logged)
    found = [outcome.what for outcome in sync_module.upload(run, pipeline.watched(run), dry_run=True)]
    assert ("3fa91c-report" in found) == is_logged


def test_a_dry_run_asks_nobody_and_writes_nothing(logged, server, capsys) -> None:
    assert not runs.load(logged).is_running()  # which makes the file of the lock
    before = files(logged)
    assert sync(logged, "--dry-run") == 0
    said = capsys.readouterr().out
    assert [line.rsplit(": ")[-1] for line in said.splitlines()[:2]] == ["would be uploaded"] * 2
    assert said.splitlines()[-1] == "2 would be uploaded, 1 would be made"
    assert not server.requests
    assert files(logged) == before


@pytest.mark.slow
def test_a_trial_that_went_on_is_joined(empty, server, capsys) -> None:
    log(empty, {0: [1, 2]}, ended=False)
    log(empty, {0: [3, 4]})
    assert sync(empty) == 0
    one = server.runs["3fa91c-0000"]
    assert [row["epoch"] for row in one.rows] == [1, 2, 3, 4]
    assert [row["_step"] for row in one.rows] == [1, 2, 3, 4]
    assert one.summary["best/value"] == 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "status", "reason"),
    [
        (b"UpsertBucket", 401, "not today"),
        (b"UpsertBucket", 500, "HTTP 500: not today"),
        (b"UpsertBucket", 0, "EOF"),
        (b"file_stream", 401, "401 Unauthorized"),
        (b"file_stream", 500, "filestream: "),
        (b"/storage/", 403, "file transfer: "),
        (b"CreateRunFiles", 500, "runfiles: "),
    ],
)
def test_what_a_server_refuses_is_failed_and_comes_next_time(logged, server, capsys, where, status, reason) -> None:
    def refuse(path: str, body: bytes) -> int:
        return status if where in path.encode() + b" " + body else 200

    for folder in logged.glob("wandb/*-0000"):
        shutil.rmtree(folder)
    only = (logged / "records.jsonl").read_text().splitlines()[1:]
    (logged / "records.jsonl").write_text("".join(f"{line}\n" for line in only))
    good, server.status = server.status, refuse
    assert sync(logged) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "1 failed"
    assert reason in said.splitlines()[0]
    assert KEY not in said
    assert marks(logged) == []

    server.status = good
    assert sync(logged) == 0
    # A row that had arrived comes again as the same step; nobody has seen what a real server does with it.
    assert {row["_step"]: row["epoch"] for row in server.runs["3fa91c-0001"].rows} == {1: 1, 2: 2, 3: 3}


@pytest.mark.slow
def test_one_that_fails_keeps_neither_the_others_nor_its_mark(logged, server, capsys) -> None:
    server.status = lambda path, body: 500 if b"3fa91c-0000" in body else 200
    assert sync(logged) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 failed, 1 uploaded"
    assert marks(logged) == ["run-3fa91c-0001.wandb.synced"]
    assert list(server.runs) == ["3fa91c-0001"]


def named(directory: Path, *names: str, content: bytes = b"more than a header") -> None:
    for name in names:
        folder = directory / "wandb" / name
        folder.mkdir(parents=True)
        (folder / f"run-{name.split('-', 3)[-1]}.wandb").write_bytes(content)


def states(directory: Path, dry_run: bool = True) -> list[tuple[str, str]]:
    """Of the folders."""
    run = runs.load(directory)
    outcomes = list(sync_module.upload(run, pipeline.watched(run), dry_run))
    return [(outcome.what, outcome.state) for outcome in outcomes if "run-" in outcome.what]


def test_folders_come_in_order_of_their_start(empty) -> None:
    order = ["run-20260101_000001-b", "offline-run-20260101_000002-a", "offline-run-20260102_000000-b-offline"]
    named(empty, *reversed(order))
    (empty / "wandb" / "latest-run").symlink_to(order[0])
    (empty / "wandb" / "offline-run-20260101_000003-c").mkdir()
    assert states(empty) == [(name, "would be uploaded") for name in order]


@pytest.mark.parametrize("content", [b"", b":W&B\xe1\xe1\x00"[:7]])
def test_a_file_without_content_is_passed_over(empty, monkeypatch, content) -> None:
    monkeypatch.setattr(sync_module, "check_login", lambda *_: None)
    monkeypatch.setattr(
        sync_module, "make_pages", lambda *_: {"sweep": None, "workspace": None, "report": None, "problems": []}
    )
    named(empty, "offline-run-20260101_000001-a", content=content)
    assert states(empty, dry_run=False) == [("offline-run-20260101_000001-a", "empty")]


def test_what_follows_a_failed_part_waits_and_three_failures_are_enough(empty, monkeypatch) -> None:
    monkeypatch.setattr(sync_module, "check_login", lambda *_: None)
    monkeypatch.setattr(sync_module, "make_pages", lambda *_: pytest.fail("not all runs are there"))
    tried = []
    monkeypatch.setattr(sync_module, "_upload", lambda part: tried.append(part) or part.outcome("failed", "no"))
    folders = (f"offline-run-2026010{n}_000000-{i}" for n, i in enumerate(["a", "a-offline", "b", "c", "d"], 1))
    named(empty, *folders)
    assert [state for _, state in states(empty, False)] == ["failed", "left out", "failed", "failed", "left out"]
    assert [part.run for part in tried] == ["a", "b", "c"]


@pytest.mark.slow
def test_what_was_never_logged_comes_from_the_records(logged, server, capsys) -> None:
    """The disk was full: one trial's file was cut off, two are missing. One was uploaded, and its folder removed."""
    (cut,) = logged.rglob("*-0001.wandb")
    content = cut.read_bytes()
    cut.write_bytes(content[: content.rindex(b"val/dice_mean") - 200])
    for trial, status in ((2, "failed"), (3, "stopped_early"), (4, "completed")):
        keep(logged, record(trial, 2, status))
    (logged / "wandb" / "uploaded.txt").write_text("3fa91c-0004 2 0\n")
    assert sync(logged, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "3fa91c-0001: would be completed from the records" in said
    assert said.splitlines()[-1] == "3 would be completed from the records, 2 would be uploaded, 1 would be made"
    assert sync(logged) == 0
    assert sorted(server.runs) == [f"3fa91c-000{n}" for n in range(4)]
    for trial, epochs, code in ((0, 2, 0), (1, 3, 0), (2, 2, 1), (3, 2, 0)):
        one = server.runs[f"3fa91c-000{trial}"]
        assert [row["epoch"] for row in one.rows] == list(range(1, epochs + 1))
        assert one.exit_code == code
    assert server.runs["3fa91c-0003"].summary["status"] == "stopped_early"
    assert sync(logged) == 0
    assert "completed from" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_what_is_uploaded_and_removed_is_still_known(empty, server, capsys) -> None:
    """`wandb clean` removes folders that are marked; the trial goes on after that, and nobody logs it."""
    log(empty, {0: [1]}, ended=False)
    assert sync(empty) == 0
    for folder in (empty / "wandb").glob("*run-*"):
        shutil.rmtree(folder)
    (empty / "wandb" / "sweep.json").unlink()
    keep(empty, record(0, 3))
    assert sync(empty) == 0
    run = server.runs["3fa91c-0000"]
    assert [row["epoch"] for row in run.rows] == [1, 2, 3]
    assert (run.exit_code, run.summary["status"]) == (0, "completed")
    for folder in (empty / "wandb").glob("*run-*"):
        shutil.rmtree(folder)
    (empty / "wandb" / "sweep.json").unlink()
    assert sync(empty) == 0
    made = server.sweeps[list(server.sweeps)[-1]]["mutations"][-1]
    assert json.loads(made["priorRunsFilters"]) == {"$or": [{"name": "3fa91c-0000"}]}


@pytest.mark.slow
def test_a_full_disk_is_said_and_made_good_from_the_records(empty, server, capsys, caplog) -> None:
    """As a limit on what the logger process and wandb's own may write; the driver's disk is another one."""
    tracker = WandbTracker("offline", wait_s=offline.DEADLINE_S)
    trackers = Trackers([tracker])
    trackers.search_started(pipeline.watched(runs.load(empty)))
    assert tracker.pid
    resource.prlimit(tracker.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    for trial, epochs in ((0, 2), (1, 200)):
        offline.start(trackers, trial)
        for number in range(1, epochs + 1):
            offline.epoch(trackers, trial, number, 0.1 * number)
        found = record(trial, epochs)
        trackers.trial_ended(found)
        keep(empty, found)
    trackers.search_ended("finished")
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert "3fa91c-0001; nothing is lost for good: `tuner sync" in said
    assert "3fa91c-0000" not in said
    assert sync(empty) == 0
    assert "3fa91c-0001: completed from the records" in capsys.readouterr().out
    for trial, epochs in ((0, 2), (1, 200)):
        run = server.runs[f"3fa91c-000{trial}"]
        assert [row["epoch"] for row in run.rows] == list(range(1, epochs + 1))
        assert (run.exit_code, run.summary["status"]) == (0, "completed")


@pytest.mark.slow
def test_a_run_whose_process_was_killed_arrives_as_far_as_it_goes(empty, server, capsys) -> None:
    """The search has not gone on, so no record says more."""
    logged = empty
    log(logged, {1: [1, 2, 3]})
    (logged / "records.jsonl").unlink()
    (file,) = logged.rglob("*-0001.wandb")
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"device_seconds") - 10])
    assert sync(logged) == 0
    assert "uploaded: as far as its file goes" in capsys.readouterr().out
    assert [row["epoch"] for row in server.runs["3fa91c-0001"].rows] == [1, 2, 3]
    assert server.runs["3fa91c-0001"].exit_code == 1
    assert len(marks(logged)) == 1


@pytest.mark.slow
def test_one_killed_before_its_first_record_is_empty(logged, server, capsys) -> None:
    (file,) = logged.rglob("*-0001.wandb")
    file.write_bytes(file.read_bytes()[:100])
    (logged / "records.jsonl").write_text("")
    assert sync(logged) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 uploaded, 1 empty, 3 made"


def test_a_run_that_is_being_logged_is_refused(empty, server, capsys) -> None:
    directory = empty
    tracker = WandbTracker("offline", wait_s=offline.DEADLINE_S)
    tracker.search_started(pipeline.watched(runs.load(directory)))
    try:
        offline.start(tracker, 0)
        offline.until(lambda: list(directory.rglob("*.wandb")), "the file of a run")
        assert sync(directory) == 2
        assert "is being written, or uploaded by another" in capsys.readouterr().err
    finally:
        tracker.search_ended("finished")
    assert not server.requests
    assert sync(directory, "--dry-run") == 0


def test_a_search_that_runs_is_refused(logged, server, capsys) -> None:
    with runs.load(logged).locked():
        assert sync(logged) == 2
    assert "is running, and its W&B files are still written" in capsys.readouterr().err
    assert not server.requests


def test_without_anything_logged(empty, server, capsys) -> None:
    run = runs.load(empty)
    run.note(options=run.info["options"] | {"wandb": "off"})
    assert sync(empty) == 2
    assert "search with `--wandb offline`" in capsys.readouterr().err
    assert not server.requests


def test_no_run(tmp_path, capsys) -> None:
    assert sync(tmp_path / "nothing") == 2
    assert "must be the folder of a run" in capsys.readouterr().err


def test_without_an_account(logged, capsys) -> None:
    assert sync(logged) == 2
    assert "tuner sync needs a W&B API key, found none; run `wandb login`" in capsys.readouterr().err
    assert sync(logged, "--dry-run") == 0


@pytest.mark.slow
def test_a_ctrl_c_keeps_what_is_uploaded_and_the_key_is_no_argument(logged, server) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(path: str, body: bytes) -> int:
        if len(marks(logged)) == 1:
            asked.set()
            answer.wait(offline.DEADLINE_S)
        return 200

    server.status = hang
    command = [sys.executable, "-m", "tuner", "sync", str(logged)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c)
    try:
        assert asked.wait(offline.DEADLINE_S)
        (uploader,) = offline.children(process.pid)
        family = [process.pid, uploader, *offline.children(uploader)]
        arguments = [Path(f"/proc/{pid}/cmdline").read_text() for pid in family]
        assert any("\0sync\0" in line for line in arguments)
        assert not any(KEY in line for line in arguments)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=offline.DEADLINE_S)
    finally:
        answer.set()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "the same command goes on with the rest" in said
    assert all(offline.gone(pid) for pid in family[1:])
    assert len(marks(logged)) == 1
    server.status = lambda path, body: 200
    assert sorted(state for _, state in states(logged, False)) == ["already there", "uploaded"]


def test_a_second_sync_waits_for_nobody(logged, server, capsys) -> None:
    with (logged / "wandb" / "tracker.log").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert sync(logged) == 2
    assert "another `tuner sync`" in capsys.readouterr().err


@pytest.mark.slow
def test_an_upload_has_a_limit(logged, server, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sync_module, "UPLOAD_LIMIT_S", 0.01)
    assert sync(logged) == 1
    assert "took longer than 0.01 s" in capsys.readouterr().out
    assert marks(logged) == []
