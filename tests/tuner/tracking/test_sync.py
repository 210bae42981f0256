"""`tuner sync` with wandb's own uploader and a stub of its server on loopback."""

import base64
import fcntl
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import heeds_ctrl_c
from tests.tuner.tracking import test_wandb_runs as offline
from tests.tuner.tracking.stub_server import StubServer
from tuner import cli, run
from tuner.tracking import RunInfo, WandbTracker
from tuner.tracking import sync as sync_module

KEY = offline.KEY
DIRECTORY = "cracks"

pytestmark = pytest.mark.timeout(90)

no_network_and_no_home = offline.no_network_and_no_home


@pytest.fixture
def server(monkeypatch) -> Iterator[StubServer]:
    """Answers, and is where wandb looks; a failure is not tried for long."""
    with StubServer() as server:
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
def two_trials(tmp_path_factory) -> Path:
    """Two trials that were logged offline; only to be copied."""
    directory = tmp_path_factory.mktemp("logged") / DIRECTORY
    log(directory, {0: [1, 2], 1: [1, 2, 3]})
    return directory


def log(directory: Path, epochs: dict[int, list[int]], ended: bool = True) -> None:
    """A session of a search, which logs these epochs of these trials."""
    directory.mkdir(exist_ok=True)
    tracker = WandbTracker("offline", wait_s=offline.DEADLINE_S)
    tracker.search_started(RunInfo(DIRECTORY, "3fa91c", directory, {}, None, 10, None, "dice_mean", "max"))
    for trial, numbers in epochs.items():
        offline.start(tracker, trial, resumed_epoch=numbers[0] - 1)
        for number in numbers:
            offline.epoch(tracker, trial, number, 0.1 * number, **({"crack": offline.png()} if number == 2 else {}))
        if ended:
            tracker.trial_ended(offline.record(trial))
    tracker.search_ended("finished")


@pytest.fixture
def logged(two_trials, tmp_path, monkeypatch) -> Path:
    """A run directory of its own, which the verb takes for a run's."""
    directory = tmp_path / DIRECTORY
    shutil.copytree(two_trials, directory, symlinks=True)
    monkeypatch.setattr(run, "load", lambda path: SimpleNamespace(directory=Path(path), is_running=lambda: False))
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
    assert said.splitlines()[-1] == "2 uploaded"
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

    count = len(server.requests)
    assert sync(logged) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 already there"
    assert len(server.requests) == count

    assert server.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    assert KEY not in said
    assert not [path for path, content in files(logged).items() if KEY.encode() in content]


def test_a_dry_run_asks_nobody_and_writes_nothing(logged, server, capsys) -> None:
    before = files(logged)
    assert sync(logged, "--dry-run") == 0
    said = capsys.readouterr().out
    assert [line.rsplit(": ")[-1] for line in said.splitlines()] == ["would be uploaded"] * 2 + ["2 would be uploaded"]
    assert not server.requests
    assert files(logged) == before


@pytest.mark.slow
def test_a_trial_that_went_on_is_joined(tmp_path, logged, server, capsys) -> None:
    directory = tmp_path / "resumed"
    log(directory, {0: [1, 2]}, ended=False)
    log(directory, {0: [3, 4]})
    assert sync(directory) == 0
    one = server.runs["3fa91c-0000"]
    assert [row["epoch"] for row in one.rows] == [1, 2, 3, 4]
    assert [row["_step"] for row in one.rows] == [0, 1, 2, 3]
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
    assert {row["_step"]: row["epoch"] for row in server.runs["3fa91c-0001"].rows} == {0: 1, 1: 2, 2: 3}


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
    return [(outcome.folder, outcome.state) for outcome in sync_module.upload(directory, dry_run)]


def test_folders_come_in_order_of_their_start(tmp_path) -> None:
    order = ["offline-run-20260101_000001-b", "offline-run-20260101_000002-a", "offline-run-20260102_000000-b-offline"]
    named(tmp_path, *reversed(order))
    (tmp_path / "wandb" / "latest-run").symlink_to(order[0])
    (tmp_path / "wandb" / "offline-run-20260101_000003-c").mkdir()
    assert states(tmp_path) == [(name, "would be uploaded") for name in order]
    assert [outcome.run for outcome in sync_module.upload(tmp_path, True)] == ["b", "a", "b-offline"]


@pytest.mark.parametrize("content", [b"", b":W&B\xe1\xe1\x00"[:7]])
def test_a_file_without_content_is_passed_over(tmp_path, monkeypatch, content) -> None:
    monkeypatch.setattr(sync_module, "check_login", lambda *_: None)
    named(tmp_path, "offline-run-20260101_000001-a", content=content)
    assert states(tmp_path, dry_run=False) == [("offline-run-20260101_000001-a", "empty")]


def test_what_follows_a_failed_part_waits_and_three_failures_are_enough(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sync_module, "check_login", lambda *_: None)
    tried = []
    monkeypatch.setattr(sync_module, "_upload", lambda part: tried.append(part) or part.outcome("failed", "no"))
    named(tmp_path, *(f"offline-run-2026010{n}_000000-{i}" for n, i in enumerate("aabcd", 1)))
    assert [state for _, state in states(tmp_path, False)] == ["failed", "left out", "failed", "failed", "left out"]
    assert [part.run for part in tried] == ["a", "b", "c"]


@pytest.mark.slow
def test_a_run_whose_process_was_killed_arrives_as_far_as_it_goes(logged, server, capsys) -> None:
    (file,) = logged.rglob("*-0001.wandb")
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"device_seconds") - 10])
    assert sync(logged) == 0
    assert "uploaded: as far as its file goes" in capsys.readouterr().out
    assert [row["epoch"] for row in server.runs["3fa91c-0001"].rows] == [1, 2, 3]
    assert server.runs["3fa91c-0001"].exit_code == 1
    assert len(marks(logged)) == 2


@pytest.mark.slow
def test_one_killed_before_its_first_record_is_empty(logged, server, capsys) -> None:
    (file,) = logged.rglob("*-0001.wandb")
    file.write_bytes(file.read_bytes()[:100])
    assert sync(logged) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 uploaded, 1 empty"


def test_a_run_that_is_being_logged_is_refused(tmp_path, logged, server, capsys) -> None:
    directory = tmp_path / "running"
    directory.mkdir()
    tracker = WandbTracker("offline", wait_s=offline.DEADLINE_S)
    tracker.search_started(RunInfo(DIRECTORY, "3fa91c", directory, {}, None, 10, None, "dice_mean", "max"))
    try:
        offline.start(tracker, 0)
        offline.until(lambda: list(directory.rglob("*.wandb")), "the file of a run")
        assert sync(directory) == 2
        assert "is being written, or uploaded by another" in capsys.readouterr().err
    finally:
        tracker.search_ended("finished")
    assert not server.requests
    assert sync(directory, "--dry-run") == 0


def test_a_search_that_runs_is_refused(logged, server, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run, "load", lambda path: SimpleNamespace(directory=Path(path), is_running=lambda: True))
    assert sync(logged) == 2
    assert "is running, and its W&B files are still written" in capsys.readouterr().err
    assert not server.requests


def test_without_anything_offline(tmp_path, logged, capsys) -> None:
    named(tmp_path / "other", "run-20260101_000000-online")
    assert sync(tmp_path / "other") == 2
    assert "search with `--wandb offline`" in capsys.readouterr().err


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
    code = (
        "import sys; from pathlib import Path; from tuner.tracking.sync import upload; list(upload(Path(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(logged)], stderr=subprocess.PIPE, preexec_fn=heeds_ctrl_c
    )
    try:
        assert asked.wait(offline.DEADLINE_S)
        (uploader,) = offline.children(process.pid)
        family = [process.pid, uploader, *offline.children(uploader)]
        arguments = [Path(f"/proc/{pid}/cmdline").read_text() for pid in family]
        assert any("\0sync\0" in line for line in arguments)
        assert not any(KEY in line for line in arguments)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=offline.DEADLINE_S)
    finally:
        answer.set()
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGINT
    assert all(offline.gone(pid) for pid in family[1:])
    assert len(marks(logged)) == 1
    server.status = lambda path, body: 200
    assert [outcome.state for outcome in sync_module.upload(logged)] in (
        ["already there", "uploaded"], ["uploaded", "already there"],
    )  # fmt: skip


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
