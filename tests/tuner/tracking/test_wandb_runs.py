"""W&B with real parts: an offline logger process, whose runs are read back with W&B's own reader."""

import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tuner.tracking import RunInfo, Tracker, Trackers, WandbTracker, check_online, wandb_process, wandb_runs
from tuner.tracking.names import numbers
from tuner.tracking.wandb_files import files_of
from tuner.tracking.wandb_log import INTERRUPTED

ROOT = Path(__file__).parents[3]
WANDB = Path(sys.executable).parent / "wandb"
KEY = "0123456789abcdef" * 3
DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def no_network_and_no_home(tmp_path, monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a mistake would meet a closed port
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("NETRC", raising=False)


@pytest.fixture
def info(tmp_path) -> RunInfo:
    directory = tmp_path / "cracks"
    directory.mkdir()
    return RunInfo("cracks", "3fa91c", directory, {}, {"dilate": 1}, 10, None, "dice_mean", "max")


@pytest.fixture
def tracker(info):
    """A tracker whose search has started; its process is ended whatever the test does."""
    tracker = WandbTracker("offline", wait_s=DEADLINE_S)
    tracker.search_started(info)
    yield tracker
    assert tracker._process is not None
    if tracker._process.poll() is None:
        tracker._process.kill()
        tracker._process.wait()


def start(tracker: Tracker, trial: int, history: list[dict[str, Any]] | None = None, **params: Any) -> None:
    searched = {"learning_rate": 0.01, "dilate": 3} | params
    config = {"architecture": "segdecnet", "epochs": 50, "num_segmented": "all", **searched}
    tracker.trial_started(f"3fa91c-{trial:04d}", searched, config, history or [])


def figures_of(number: int, value: float | None) -> dict[str, Any]:
    return {
        "epoch": number, "loss_segmentation": 1 / number, "loss_decision": 0.5, "loss_total": 1 / number + 0.5,
        "dice_mean": value, "decision_ap": None, "two_pixel_f1": float("nan"),
        "threshold": 0.1 * number, "value": value,
    }  # fmt: skip


def history_of(*values: float) -> list[dict[str, Any]]:
    return [figures_of(number, value) for number, value in enumerate(values, 1)]


def epoch(tracker: Tracker, trial: int, number: int, value: float | None, **previews: bytes) -> None:
    use = {"cpu_percent": 98.5, "memory_mib": 512.0}
    tracker.epoch_ended(f"3fa91c-{trial:04d}", figures_of(number, value), use, previews)


def record(trial: int, status: str = "completed", **changes: Any) -> dict[str, Any]:
    values = {
        "trial": f"3fa91c-{trial:04d}", "status": status, "reason": None, "value": 0.75, "best_epoch": 2,
        "epochs": 3, "seconds": 7.5, "device_seconds": 7.5, "baseline": False, "replayed_from": None,
        "thresholds": {"segmentation_probability": 0.25}, "params": {"dilate": 3}, "config": {"epochs": 50},
        "history": [],
    }  # fmt: skip
    return values | changes


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 2), 200).save(stream, "png")
    return stream.getvalue()


def directories(info: RunInfo, trial: int) -> list[Path]:
    return sorted((info.directory / "wandb").glob(f"offline-run-*-3fa91c-{trial:04d}*"))


def inspect(directory: Path, *options: str) -> str:
    command = [str(WANDB), "leet", "inspect", "--json", *options, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary_of(info: RunInfo, trial: int) -> dict[str, Any]:
    (directory,) = directories(info, trial)
    return json.loads(inspect(directory, "--summary"))


def records_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in inspect(directory).splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def rows_of(info: RunInfo, trial: int) -> list[list[int]]:
    """The epochs of each part of a run, by the time of its start."""
    return [
        [row["item"]["epoch"] for row in records_of(file.parent, "history")]
        for file in files_of(info.directory, f"3fa91c-{trial:04d}")
    ]


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:g} s for {what}"
        time.sleep(0.02)
    return result


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked after is still in the table as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_search_can_be_read_back(tracker, info) -> None:
    start(tracker, 0, dilate=1)
    start(tracker, 1)
    for number, value in enumerate([0.5, 0.75, 0.7], 1):
        epoch(tracker, 0, number, value)
        epoch(tracker, 1, number, value, **({"crack_7": png()} if number == 3 else {}))
    tracker.trial_ended(record(0, "stopped_early", reason="rung 3"))
    tracker.trial_ended(record(1))
    tracker.search_ended("finished")

    (directory,) = directories(info, 1)
    described = records_of(directory, "run")[-1]
    assert (described["project"], described["run_group"], described["job_type"]) == (
        "segdec-tuner", "cracks", "trial",
    )  # fmt: skip
    assert described["run_id"] == described["display_name"] == "3fa91c-0001"
    assert described["tags"] == ["completed"]
    assert records_of(directory, "metric")[0]["step_metric"] == "epoch"
    rows = [row["item"] for row in records_of(directory, "history")]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["loss/segmentation"] for row in rows] == [1, 0.5, pytest.approx(1 / 3)]
    assert [row["loss/decision"] for row in rows] == [0.5, 0.5, 0.5]
    assert [row["loss/total"] for row in rows] == [1.5, 1, pytest.approx(1 / 3 + 0.5)]
    assert [row["val/dice_mean"] for row in rows] == [0.5, 0.75, 0.7]
    assert [row["val/objective"] for row in rows] == [0.5, 0.75, 0.7]
    assert [row["best/value"] for row in rows] == [0.5, 0.75, 0.75]
    assert [row["use/memory_mib"] for row in rows] == [512, 512, 512]
    assert not any("decision_ap" in name or "two_pixel" in name for row in rows for name in row)

    ended = summary_of(info, 1)
    assert ended["config"] == {
        "architecture": "segdecnet", "epochs": 50, "num_segmented": "all", "learning_rate": 0.01, "dilate": 3,
    }  # fmt: skip
    assert (ended["state"], ended["exit_code"]) == ("finished", 0)
    summary = ended["summary"]
    assert (summary["best/value"], summary["best/epoch"], summary["best/threshold"]) == (0.75, 2, 0.25)
    assert (summary["status"], summary["epochs"], summary["seconds"]) == ("completed", 3, 7.5)
    picture = summary["preview/crack_7"]
    assert (picture["width"], picture["height"], picture["caption"]) == (8, 2, "epoch 3")
    assert (directory / "files" / picture["path"]).read_bytes() == png()  # encoded once, by the trial

    baseline = summary_of(info, 0)
    assert (baseline["state"], baseline["exit_code"]) == ("finished", 0)
    assert set(baseline["tags"]) == {"baseline", "stopped_early"}
    assert baseline["summary"]["reason"] == "rung 3"


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_trial_that_went_wrong_has_failed_in_wandb(tracker, info, status) -> None:
    start(tracker, 0)
    epoch(tracker, 0, 1, None)
    tracker.trial_ended(record(0, status, value=None, best_epoch=None, thresholds=None, reason="loss is NaN"))
    tracker.search_ended("finished")
    ended = summary_of(info, 0)
    assert (ended["state"], ended["exit_code"], ended["tags"]) == ("failed", 1, [status])
    assert ended["summary"]["reason"] == "loss is NaN"
    assert not any(name.startswith("best/") for name in ended["summary"])
    assert "NaN" not in json.dumps({k: v for k, v in ended["summary"].items() if k != "reason"})


def test_a_trial_read_off_another_is_logged_whole(tracker, info) -> None:
    history = [{"epoch": n, "loss_total": 1 / n, "dice_mean": 0.1 * n} for n in (1, 2, 3)]
    tracker.trial_ended(record(4, history=history, replayed_from="3fa91c-0001"))
    tracker.search_ended("finished")
    ended = summary_of(info, 4)
    assert ended["config"] == {"epochs": 50, "dilate": 3}
    assert ended["summary"]["replayed_from"] == "3fa91c-0001"
    (directory,) = directories(info, 4)
    assert [row["item"]["epoch"] for row in records_of(directory, "history")] == [1, 2, 3]


def test_runs_open_when_the_search_stops_keep_their_data(tracker, info) -> None:
    for trial in range(3):
        start(tracker, trial)
        epoch(tracker, trial, 1, 0.5)
        epoch(tracker, trial, 2, 0.25)
    tracker.search_ended("stopped")
    for trial in range(3):
        ended = summary_of(info, trial)
        assert (ended["exit_code"], ended["tags"]) == (INTERRUPTED, ["interrupted"])
        assert ended["summary"]["status"] == "interrupted"
        assert (ended["summary"]["best/value"], ended["summary"]["best/epoch"]) == (0.5, 1)
        assert ended["summary"]["epoch"] == 2


def test_a_held_trial_goes_on_in_its_run_or_ends_there(tracker, info) -> None:
    for trial in (0, 1):
        start(tracker, trial)
        epoch(tracker, trial, 1, 0.5 - trial / 10)
        tracker.trial_held(record(trial, "stopped_early"))
    start(tracker, 0, history_of(0.5))
    epoch(tracker, 0, 2, 0.6)
    tracker.trial_ended(record(0))
    tracker.trial_ended(record(1, "stopped_early", reason="not among the best at epoch 1"))
    tracker.search_ended("finished")
    for trial, epochs, tag in ((0, [1, 2], "completed"), (1, [1], "stopped_early")):
        (directory,) = directories(info, trial)
        assert [row["item"]["epoch"] for row in records_of(directory, "history")] == epochs
        assert summary_of(info, trial)["tags"] == [tag]


def test_a_held_trial_that_an_earlier_session_logged_only_gets_its_end(tracker, info) -> None:
    history = history_of(0.1, 0.2)
    start(tracker, 3, history)
    tracker.search_ended("stopped")
    later = WandbTracker("offline", wait_s=DEADLINE_S)
    later.search_started(info)
    later.trial_ended(record(3, "stopped_early", history=history, epochs=2))
    later.search_ended("finished")
    assert rows_of(info, 3) == [[1, 2], []]
    assert json.loads(inspect(directories(info, 3)[1], "--summary"))["summary"]["status"] == "stopped_early"


@pytest.mark.parametrize("logged", [0, 2, 3])
def test_epochs_that_were_never_logged_come_when_their_trial_goes_on(tracker, info, logged) -> None:
    """The driver was killed between a checkpoint and the line that told of it, or the file was cut off."""
    start(tracker, 0)
    for number in range(1, logged + 1):
        epoch(tracker, 0, number, 0.1 * number)
    tracker.search_ended("stopped")
    later = WandbTracker("offline", wait_s=DEADLINE_S)
    later.search_started(info)
    start(later, 0, history_of(0.9, 0.2, 0.3))
    epoch(later, 0, 4, 0.4)
    later.trial_ended(record(0, epochs=5, value=None, best_epoch=None, history=history_of(0.9, 0.2, 0.3, 0.4, 0.5)))
    later.search_ended("finished")
    first, second = rows_of(info, 0)
    assert first + second == [1, 2, 3, 4, 5]
    ended = json.loads(inspect(directories(info, 0)[1], "--summary"))["summary"]
    assert (ended["best/value"], ended["best/epoch"]) == (0.9, 1)  # known from rows that another file holds


@pytest.mark.slow
def test_a_resumed_trial_goes_on_under_its_id(tracker, info) -> None:
    start(tracker, 0)
    epoch(tracker, 0, 1, 0.9)
    start(tracker, 0, history_of(0.9))  # its node died; the run is still open
    epoch(tracker, 0, 2, 0.5)
    tracker.search_ended("stopped")

    resumed = WandbTracker("offline")
    resumed.search_started(info)
    start(resumed, 0, history_of(0.9, 0.5))
    epoch(resumed, 0, 3, 0.6)
    resumed.search_ended("stopped")
    first, second = sorted(directories(info, 0), key=lambda path: path.stat().st_mtime)
    assert {records_of(path, "run")[-1]["run_id"] for path in (first, second)} == {"3fa91c-0000"}
    assert [row["item"]["epoch"] for row in records_of(first, "history")] == [1, 2]
    assert [row["item"]["epoch"] for row in records_of(second, "history")] == [3]
    assert json.loads(inspect(second, "--summary"))["summary"]["best/value"] == 0.9


def test_two_objectives_and_numpy_scalars_and_the_project(info, monkeypatch) -> None:
    np = pytest.importorskip("numpy")
    monkeypatch.setenv("WANDB_PROJECT", "bridges")
    tracker = WandbTracker("offline")
    tracker.search_started(info)
    start(tracker, 0, learning_rate=np.float32(0.5), dilate=np.int64(5))
    tracker.trial_ended(record(0, value=[0.5, 12]))
    tracker.search_ended("finished")
    ended = summary_of(info, 0)
    assert ended["project"] == "bridges"
    assert (ended["config"]["learning_rate"], ended["config"]["dilate"]) == (0.5, 5)
    assert (ended["summary"]["best/value_1"], ended["summary"]["best/value_2"]) == (0.5, 12)


def test_nothing_is_printed_and_the_key_is_nowhere(info, monkeypatch, capfd) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = WandbTracker("offline")
    tracker.search_started(info)
    start(tracker, 0)
    tracker.search_ended("finished")
    assert summary_of(info, 0)["tags"] == ["interrupted"]
    assert capfd.readouterr() == ("", "")
    assert (info.directory / "wandb" / "tracker.log").read_text() == ""
    files = [path for path in info.directory.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_variables_of_the_users_own_run_bend_nothing(info, monkeypatch) -> None:
    for name, value in {"RUN_ID": "mine", "RESUME": "must", "NAME": "mine", "MODE": "disabled"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    tracker = WandbTracker("offline")
    tracker.search_started(info)
    start(tracker, 0)
    tracker.search_ended("stopped")
    (directory,) = directories(info, 0)
    described = records_of(directory, "run")[-1]
    assert (described["run_id"], described["run_group"]) == ("3fa91c-0000", "cracks")


def test_signals_do_not_end_the_process(tracker, info) -> None:
    start(tracker, 0)
    until(lambda: directories(info, 0), "the run")
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(tracker.pid, name)
    epoch(tracker, 0, 1, 0.5)
    tracker.trial_ended(record(0))
    tracker.search_ended("stopped")
    assert summary_of(info, 0)["summary"]["epoch"] == 1


def test_a_dead_process_switches_the_tracker_off(tracker, info, caplog) -> None:
    class Counting(Tracker):
        epochs = 0

        def epoch_ended(self, trial, figures, use, previews) -> None:
            self.epochs += 1

    other = Counting()
    trackers = Trackers([tracker, other])
    start(trackers, 0)
    until(lambda: directories(info, 0), "the run")
    core = children(tracker.pid)
    os.kill(tracker.pid, signal.SIGKILL)
    until(lambda: tracker._process.poll() is not None, "the end of the process")
    for number in (1, 2, 3):
        epoch(trackers, 0, number, 0.5)
    trackers.search_ended("finished")
    assert other.epochs == 3
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert f"the W&B logger process (pid {tracker.pid}) ended with exit code -9" in warning
    assert warning.startswith("W&B is switched off, for it failed (RuntimeError: ")
    assert "; the search goes on; nothing is lost for good: " in warning
    assert warning.count(f"`tuner sync {info.directory}` completes W&B from the records") == 1
    until(lambda: all(map(gone, core)), "the end of wandb-core")


def test_an_error_in_the_process_is_named_and_the_other_runs_are_kept(tracker, info) -> None:
    start(tracker, 0)
    epoch(tracker, 0, 1, 0.5, broken=b"not a PNG")
    until(lambda: tracker._process.poll() is not None, "the end of the process")
    with pytest.raises(RuntimeError, match=r"exit code 1: UnidentifiedImageError: cannot identify"):
        start(tracker, 1)
    assert summary_of(info, 0)["tags"] == ["interrupted"]


def test_a_message_of_many_lines_is_told_from_its_start(info, monkeypatch) -> None:
    """The last line of a traceback of pydantic is the address of a page that explains errors."""
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense://someone:s3cret@")
    tracker = WandbTracker("offline", wait_s=DEADLINE_S)
    tracker.search_started(info)
    start(tracker, 0)
    with pytest.raises(RuntimeError, match=r"exit code 1: ValidationError: 1 validation error for .* base_url "):
        tracker.search_ended("finished")
    assert "s3cret" not in (info.directory / "wandb" / "tracker.log").read_text()


def test_settings_of_the_current_folder_bend_nothing(info, monkeypatch, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "wandb").mkdir(parents=True)
    (elsewhere / "wandb" / "settings").write_text("[default]\nproject = theirs\nentity = them\nrun_group = theirs\n")
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(ROOT, elsewhere))
    monkeypatch.chdir(elsewhere)
    tracker = WandbTracker("offline", wait_s=DEADLINE_S)
    tracker.search_started(info)
    start(tracker, 0)
    tracker.search_ended("stopped")
    (directory,) = directories(info, 0)
    described = records_of(directory, "run")[-1]
    assert (described["project"], described["run_group"], described.get("entity")) == ("segdec-tuner", "cracks", None)


def test_the_way_to_upload_can_be_pasted_into_a_shell() -> None:
    assert shlex.split(wandb_runs.sync_command(Path("/w ö k/x"))) == ["tuner", "sync", "/w ö k/x"]


def test_a_process_that_hangs_blocks_nothing_and_loses_nothing(info, caplog) -> None:
    tracker = WandbTracker("offline", wait_s=0.3)
    tracker.search_started(info)
    start(tracker, 0)
    until(lambda: directories(info, 0), "the run")
    core = children(tracker.pid)
    os.kill(tracker.pid, signal.SIGSTOP)
    for number in range(1, 301):
        epoch(tracker, 0, number, 0.5)
    tracker.search_ended("stopped")
    assert "still being written or uploaded, which goes on in the background" in caplog.text
    assert f"`tuner sync {info.directory}` then brings what is missing" in caplog.text
    os.kill(tracker.pid, signal.SIGCONT)
    until(lambda: all(map(gone, [tracker.pid, *core])), "the end of the process")
    (rows,) = rows_of(info, 0)
    # The pipe took what it holds; a driver that is gone hands over no more, and its records have the rest.
    assert rows == list(range(1, len(rows) + 1))
    assert rows


def test_a_process_that_does_not_read_costs_previews_but_no_memory(info, caplog) -> None:
    tracker = WandbTracker("offline", wait_s=0.0)
    tracker.search_started(info)
    start(tracker, 0)
    until(lambda: directories(info, 0), "the run")
    core = children(tracker.pid)
    os.kill(tracker.pid, signal.SIGSTOP)
    for number in range(1, 101):
        epoch(tracker, 0, number, 0.5, crack=bytes(1_000_000))
    waiting = tracker._queue.qsize()
    tracker.search_ended("stopped")
    assert waiting > 90  # of 100 figures the pipe takes some
    (left_out,) = re.findall(r"could not keep up: (\d+) previews were left out", caplog.text)
    assert 30 <= int(left_out) <= 36
    os.kill(tracker.pid, signal.SIGKILL)
    until(lambda: all(map(gone, [tracker.pid, *core])), "the end of the process")


def test_what_a_server_holds_up_is_worked_off_when_the_driver_has_gone(info, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    tracker = WandbTracker("online", wait_s=0.3)
    tracker.search_started(info)
    start(tracker, 0)
    for number in range(1, 301):
        epoch(tracker, 0, number, 0.5)
    tracker.search_ended("stopped")
    (told,) = caplog.messages
    assert told == (
        "W&B: trials are still being written or uploaded, which goes on in the background for ten minutes at most; "
        f"`tuner sync {info.directory}` then brings what is missing"
    )
    until(lambda: gone(tracker.pid), "the end of the process")
    assert rows_of(info, 0)[-1] == list(range(1, 301))


def test_the_next_session_waits_for_what_an_earlier_one_has_to_write(info, monkeypatch) -> None:
    """As after a kill: what the first process has not written yet, the second would write as well."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    first = WandbTracker("online", wait_s=0.0)
    first.search_started(info)
    start(first, 0)
    for value in (0.1, 0.2):
        epoch(first, 0, round(10 * value), value)
    first.search_ended("stopped")
    until((info.directory / "wandb" / "tracker.lock").exists, "the first process, which else may come second")
    assert not gone(first.pid)
    second = WandbTracker("offline", wait_s=DEADLINE_S)
    second.search_started(info)
    start(second, 0, history_of(0.1, 0.2, 0.3))
    epoch(second, 0, 4, 0.4)
    second.trial_ended(record(0, history=history_of(0.1, 0.2, 0.3, 0.4)))
    second.search_ended("finished")
    until(lambda: gone(first.pid), "the end of the first process")
    assert [rows for rows in rows_of(info, 0) if rows] == [[1, 2], [3, 4]]


def test_trials_outside_a_search_wait_for_nobody(info) -> None:
    """Several share a directory, and each may last for hours."""
    first, second = (WandbTracker("offline", wait_s=DEADLINE_S) for _ in range(2))
    first.search_started(replace(info, shared=True))
    start(first, 0)
    until(lambda: directories(info, 0), "the first run")
    second.search_started(replace(info, shared=True))
    start(second, 1)
    second.trial_ended(record(1))
    second.search_ended("finished")
    assert gone(second.pid)
    assert not gone(first.pid)
    first.search_ended("finished")


def test_previews_are_left_out_while_too_much_waits(capfd, monkeypatch) -> None:
    monkeypatch.setattr(wandb_process, "PREVIEW_BACKLOG", 2)
    sent = [{"event": "epoch_ended", "previews": {"a": "", "b": ""}} for _ in range(5)]
    gate = threading.Event()

    def held_up() -> Iterator[dict[str, Any]]:
        yield from sent
        gate.set()

    inbox = wandb_process.Inbox(held_up())
    gate.wait(DEADLINE_S)
    assert [len(event["previews"]) for event in inbox] == [2, 2, 0, 0, 0]
    assert inbox.previews_left_out == 6


def test_events_before_the_search_are_refused() -> None:
    with pytest.raises(RuntimeError, match="the search has not started"):
        WandbTracker("offline").trial_ended(record(0))
    WandbTracker("offline").search_ended("failed")


DRIVER = """
    import os, pathlib, signal, sys, time
    from tuner.tracking import RunInfo, WandbTracker

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands down "ignore"

    run = RunInfo("cracks", "3fa91c", pathlib.Path(sys.argv[1]), {}, None, 10, None, "dice_mean", "max")
    tracker = WandbTracker("offline")
    tracker.search_started(run)
    tracker.trial_started("3fa91c-0000", {"dilate": 3}, {"dilate": 3}, [])
    for epoch in (1, 2, 3):
        tracker.epoch_ended("3fa91c-0000", {"epoch": epoch, "value": 0.1 * epoch}, {}, {})
    tracker.trial_started("3fa91c-0001", {"dilate": 5}, {"dilate": 5}, [])
    holder = 0
    if "fork" in sys.argv:  # a child that holds the pipe open
        holder = os.fork()
        if holder == 0:
            time.sleep(60)
            os._exit(0)
    print(tracker.pid, holder, flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        tracker.search_ended("stopped")
        print("stopped", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "kill while a fork holds the pipe", "interrupt"])
def test_the_end_of_the_driver_leaves_readable_runs_and_no_process(tmp_path, info, how) -> None:
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    command = [sys.executable, str(script), str(info.directory), *(["fork"] if "fork" in how else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as driver:
        assert driver.stdout is not None
        process, holder = map(int, driver.stdout.readline().split())
        # Events are handled in order: with the second run open, the epochs of the first are written.
        until(lambda: directories(info, 1), "the second run")
        survivors = [process, *children(process)]
        try:
            if how == "interrupt":
                os.killpg(driver.pid, signal.SIGINT)
                assert driver.stdout.read().strip() == "stopped"
                assert driver.wait(DEADLINE_S) == 0
            else:
                driver.kill()
                driver.wait(DEADLINE_S)
            until(lambda: all(map(gone, survivors)), "the end of the logger process and of wandb-core")
        finally:
            if holder:
                os.kill(holder, signal.SIGKILL)
    first, second = summary_of(info, 0), summary_of(info, 1)
    assert first["tags"] == second["tags"] == ["interrupted"]
    assert (first["summary"]["epoch"], first["summary"]["best/value"]) == (3, pytest.approx(0.3))
    assert second["config"] == {"dilate": 5}


def test_online_without_a_server_goes_on_offline_and_loses_nothing(info, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_BASE_URL", "http://someone:s3cret@127.0.0.1:9")
    tracker = WandbTracker("online", wait_s=DEADLINE_S)
    tracker.search_started(info)
    for trial in range(2):
        start(tracker, trial)
        epoch(tracker, trial, 1, 0.5)
        tracker.trial_ended(record(trial))
    tracker.search_ended("finished")
    assert f"no way online, so from here on W&B is kept for `tuner sync {info.directory}`" in caplog.text
    for trial in range(2):
        ended = summary_of(info, trial)
        assert (ended["name"], ended["tags"]) == (f"3fa91c-{trial:04d}", ["completed"])
        assert ended["summary"]["epoch"] == 1
    files = [path for path in info.directory.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("variables", "found"),
    [({}, "found none"), ({"WANDB_API_KEY": "not a key!"}, "found WANDB_API_KEY invalid: API key may only")],
)
def test_online_without_a_key_is_refused(monkeypatch, variables, found) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=found) as refused:
        check_online()
    assert "run `wandb login`, set WANDB_API_KEY, or take --wandb offline" in str(refused.value)
    assert "not a key" not in str(refused.value)


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://someone:s3cret@host:port"])
def test_a_base_url_that_is_none_is_refused(monkeypatch, url) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    with pytest.raises(ValueError, match=r"WANDB_BASE_URL must be the URL of a W&B server, .*, found .*; set it right"):
        check_online()


def test_a_look_for_a_key_that_takes_too_long_is_said(monkeypatch) -> None:
    monkeypatch.setattr(wandb_runs, "LOGIN_LIMIT_S", 0.01)
    with pytest.raises(RuntimeError, match=r"wandb has not said within 0\.01 s whether there is an API key"):
        check_online()


@pytest.mark.parametrize("place", ["variable", "netrc"])
def test_online_with_a_key_is_accepted(monkeypatch, tmp_path, place) -> None:
    if place == "variable":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.invalid")
        (tmp_path / "home" / ".netrc").write_text(f"machine wandb.example.invalid login user password {KEY}\n")
        (tmp_path / "home" / ".netrc").chmod(0o600)
    check_online()


@pytest.mark.parametrize(
    ("name", "value", "row"),
    [("value", [0.5, None], {"value_1": 0.5}), ("value", True, {}), ("value", "NaN", {}), ("value", 3, {"value": 3}),
     ("value", float("inf"), {})],
)  # fmt: skip
def test_only_finite_numbers_reach_a_chart(name, value, row) -> None:
    assert numbers(name, value) == row


def test_a_line_cut_off_is_dropped() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"a": 1}\n{"a": 2}\n{"a":')
    os.close(writing)
    assert list(wandb_process.read_events(reading, os.getppid())) == [{"a": 1}, {"a": 2}]
    os.close(reading)
