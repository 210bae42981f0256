"""A run's mirror: on a real S3 server that fails, and on a mount; who owns it; and how it comes back."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from model import synthetic
from tests import s3
from tests.tuner.conftest import small_space
from tuner import mirror
from tuner import run as runs
from tuner.mirror import mirrored
from tuner.options import Options
from tuner.pipeline import run_search
from tuner.remote import Folder, StorageFailed
from tuner.run import NameTaken, Run

SESSION = {"started": 1.0, "ended": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


@pytest.fixture(scope="module")
def wire() -> Iterator[s3.Wire]:
    with s3.serving() as found:
        yield found


@pytest.fixture(params=["s3", "mount"])
def storage(request, wire: s3.Wire, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}" if request.param == "s3" else str(tmp_path / "mount")


@pytest.fixture
def run(data: Path, tmp_path: Path, storage: str) -> Run:
    """One whose search has begun."""
    made = runs.create(small_space(), data, tmp_path / "runs", options=Options(storage=storage))
    made.note(sessions=[SESSION])
    (made.directory / "trials").mkdir()
    return made


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """What is slept through is passed over."""
    slept: list[float] = []
    monkeypatch.setattr(mirror.time, "sleep", slept.append)
    return slept


def there(run: Run) -> dict[str, bytes]:
    folder = Folder(str(run.options.storage)) / run.name
    return {name: folder.read(name) for name in folder.files() if not name.startswith("trials/")}


def here(run: Run) -> dict[str, bytes]:
    return {name: (run.directory / name).read_bytes() for name in mirror._files(run.directory)}


def owner(run: Run) -> dict:
    return json.loads(there(run)["owner.json"])


def owned_by(run: Run, session: str, count: int = 0, **more: object) -> None:
    folder = Folder(str(run.options.storage)) / run.name
    found = {"session": session, "host": "elsewhere", "pid": 7, "count": count, "released": False} | more
    folder.write("owner.json", json.dumps(found).encode())


def work_on(run: Run, error: BaseException | None = None) -> None:
    """A session in which nothing happens, or one that ends so."""
    with run.locked(), mirrored(run):
        if error:
            raise error


def until(condition: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(2000):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("it did not come about")


def test_all_but_trials_and_what_is_being_made_lies_there(run: Run) -> None:
    for name in ("trials/attempt-1/x", "run.lock", ".run.json.part", ".best.part/model", "wandb/tracker.lock",
                 "study.journal", "wandb/run-1/a.wandb", "tensorboard/x/events", "evaluation/selection.json"):  # fmt: skip
        (run.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (run.directory / name).write_bytes(name.encode())
    (run.directory / "wandb/latest-run").symlink_to("run-1")
    work_on(run)
    kept = {
        "run.json",
        "splits.json",
        "study.journal",
        "wandb/run-1/a.wandb",
        "tensorboard/x/events",
        "evaluation/selection.json",
    }
    assert set(here(run)) == kept
    assert {name: data for name, data in there(run).items() if name != "owner.json"} == here(run)
    assert owner(run)["released"]


def test_a_pass_sends_what_is_new_and_takes_away_what_is_gone(run: Run, monkeypatch) -> None:
    sent: list[str] = []
    put = Folder.put

    def note(self: Folder, source: Path, name: str) -> None:
        sent.append(name)
        put(self, source, name)

    monkeypatch.setattr(Folder, "put", note)
    (run.directory / "study.journal").write_bytes(b"{}\n")
    with run.locked(), mirrored(run) as found:
        assert found.flush(30)
        assert sorted(sent) == ["run.json", "splits.json", "study.journal"]
        sent.clear()
        for second, name in enumerate(("report.html", "selection.json", "arrays.npz", "study.journal")):
            (run.directory / name).write_bytes(name.encode())
            os.utime(run.directory / name, (second, second + (name == "selection.json") * 100))
        (run.directory / "splits.json").unlink()
        assert found.flush(30)
        # The journal is never older than what was written after it; what was written last arrives last.
        assert sent == ["study.journal", "report.html", "arrays.npz", "selection.json"]
        assert "splits.json" not in there(run)
        (run.directory / "report.html").unlink()
    sent.clear()
    assert "report.html" not in there(run)
    with run.locked(), mirrored(run) as found:  # the next session knows what lies there
        (run.directory / "records.jsonl").write_bytes(b"{}\n")
        assert found.flush(30)
    assert sent == ["records.jsonl"]


def test_what_changes_under_way_waits_for_the_next_pass(run: Run, monkeypatch) -> None:
    """Or the storage might hold a selection that is newer than what it selects."""
    (run.directory / "b.json").write_bytes(b"old")
    (run.directory / "c.json").write_bytes(b"old")
    for second, name in enumerate(("b.json", "c.json")):
        os.utime(run.directory / name, (second, second))
    seen: list[dict[str, bytes]] = []
    put = Folder.put

    def change(self: Folder, source: Path, name: str) -> None:
        put(self, source, name)
        if name == "b.json" and not seen:
            for changed in ("b.json", "c.json"):
                (run.directory / changed).write_bytes(b"newer")
            seen.append({})
        elif name == "b.json":
            seen.append({"c.json": there(run).get("c.json", b"")})

    monkeypatch.setattr(Folder, "put", change)
    with run.locked(), mirrored(run) as found:
        assert found.flush(30)
    assert seen == [{}, {"c.json": b""}]
    assert there(run)["c.json"] == b"newer"


@pytest.mark.parametrize("state", ["cut", "busy"])
def test_an_outage_is_said_once_and_what_it_missed_arrives(data, wire: s3.Wire, tmp_path, caplog, state: str) -> None:
    run = runs.create(small_space(), data, tmp_path / "runs", options=Options(storage=f"s3://bucket/{tmp_path.name}"))
    run.note(sessions=[SESSION])
    with run.locked(), mirrored(run) as found:
        assert found.flush(30)
        jobs: list[int] = []
        wire.fail(state)
        try:
            (run.directory / "study.journal").write_bytes(b"{}\n")
            found.changed()
            until(lambda: found.failing)
            found.later(lambda: jobs.append(len(Folder("s3://bucket").files())))
            assert not found.flush(1.5)  # in which it tried again
            assert jobs == []
        finally:
            wire.mend()
        assert found.flush(30)
        assert not found.failing
        assert len(jobs) == 1
        assert there(run)["study.journal"] == b"{}\n"
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2
    assert "; the search goes on, and what changes is mirrored when that is over" in said[0]
    assert "is back, and holds all that was written meanwhile" in said[1]


def test_what_could_not_be_mirrored_is_said_and_the_next_session_does_it(
    data, wire: s3.Wire, tmp_path, caplog, monkeypatch
) -> None:
    run = runs.create(small_space(), data, tmp_path / "runs", options=Options(storage=f"s3://bucket/{tmp_path.name}"))
    run.note(sessions=[SESSION])
    monkeypatch.setattr(mirror, "_SECONDS_AT_THE_END", 0.2)
    try:
        with run.locked(), mirrored(run) as found:
            assert found.flush(30)
            wire.fail("cut")
            (run.directory / "evaluation").mkdir()
            (run.directory / "evaluation/selection.json").write_bytes(b"{}")
    finally:
        wire.mend()
    assert caplog.records[-1].message == (
        f"not mirrored to {run.options.storage}/small: evaluation; `tuner resume {run.directory}` does it"
    )
    assert not owner(run)["released"]
    monkeypatch.setattr(mirror, "_SECONDS_AT_THE_END", 30)
    with run.locked(), mirrored(run):  # without a wait: the last session was of this very folder
        pass
    assert there(run)["evaluation/selection.json"] == b"{}"
    assert owner(run)["released"]


def test_a_driver_that_finds_another_owner_stops_and_writes_nothing_more(run: Run, monkeypatch, caplog) -> None:
    monkeypatch.setattr(mirror, "_SECONDS_BETWEEN_BEATS", 0.05)
    with run.locked(), mirrored(run) as found:
        assert found.flush(30)
        until(lambda: owner(run)["count"] > 1)  # says that it lives
        # Again where a beat that was under way has overwritten it: then the other one would stop.
        until(lambda: owned_by(run, "another") or found.lost is not None)
        (run.directory / "study.journal").write_bytes(b"{}\n")
        assert not found.flush(1) or found.lost
    assert found.lost
    assert found.lost.startswith("the run went on elsewhere: process 7 on elsewhere works on it now")
    assert "study.journal" not in there(run)
    assert owner(run)["session"] == "another"
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [found.lost]


def test_one_that_lives_is_left_alone_and_one_that_died_is_followed(run: Run, monkeypatch) -> None:
    slept: list[float] = []
    owned_by(run, "another", count=3)

    def beat(seconds: float) -> None:
        slept.append(seconds)
        owned_by(run, "another", count=4)

    monkeypatch.setattr(mirror.time, "sleep", beat)
    with pytest.raises(ValueError, match=r"must be worked on by one process, and process 7 on elsewhere does"):
        work_on(run)
    assert owner(run)["session"] == "another"
    monkeypatch.setattr(mirror.time, "sleep", slept.append)
    with run.locked(), mirrored(run):
        assert owner(run)["session"] != "another"
    assert slept == [50, 50]
    owned_by(run, "another", released=True)
    work_on(run)
    assert slept == [50, 50]


def test_a_folder_that_is_not_the_newest_is_refused(run: Run, tmp_path: Path) -> None:
    work_on(run)
    shutil.copytree(run.directory, tmp_path / "older" / "small")
    run.note(sessions=[SESSION, {"started": 2.0, "ended": 3.0}])
    work_on(run)
    older = runs.load(tmp_path / "older/small")
    address = f"{run.options.storage}/small"
    with pytest.raises(ValueError, match=f"has sessions that it does not know; `tuner resume {address} --runs DIR`"):
        work_on(older)
    with pytest.raises(ValueError, match="found an older state of it; move it away"):
        mirror.bring(address, tmp_path / "older")
    assert mirror.bring(address, tmp_path / "runs") == run.directory


def test_a_run_is_brought_to_another_machine(run: Run, tmp_path: Path, waits: list[float], monkeypatch) -> None:
    (run.directory / "report/figures").mkdir(parents=True)
    (run.directory / "report/figures/one.png").write_bytes(b"png")
    work_on(run)
    (Folder(f"{run.options.storage}/small") / "trials").write("attempt-1/begun.json", b"{}")
    address = f"{run.options.storage}/small"
    assert mirror.is_mirror(address)
    assert not mirror.is_mirror(str(run.directory))
    brought = mirror.bring(address, tmp_path / "elsewhere")
    assert brought == tmp_path / "elsewhere" / "small"
    assert here(runs.load(brought)) == here(run)
    assert (brought / "trials").is_dir()
    assert not (brought / "trials/attempt-1").exists()
    sent: list[str] = []
    monkeypatch.setattr(Folder, "put", lambda self, source, name: sent.append(name))
    again = runs.load(brought)
    with again.locked(), mirrored(again) as found:
        assert found.flush(30)
    assert set(sent) <= {"run.json"}
    assert waits == []


def test_one_whose_owner_died_is_looked_at_twice(run: Run, tmp_path: Path, waits: list[float]) -> None:
    work_on(run)
    owned_by(run, "another", count=3)
    mirror.bring(f"{run.options.storage}/small", tmp_path / "elsewhere")
    assert waits == [50]
    brought = runs.load(tmp_path / "elsewhere/small")
    with brought.locked(), mirrored(brought):
        assert owner(brought)["session"] != "another"
    assert waits == [50]


def test_a_mount_that_lies_elsewhere_is_found_there(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path / "runs", options=Options(storage=str(tmp_path / "mount")))
    run.note(sessions=[SESSION])
    work_on(run)
    (tmp_path / "mount").rename(tmp_path / "moved")
    brought = runs.load(mirror.bring(str(tmp_path / "moved/small"), tmp_path / "elsewhere"))
    assert brought.options.storage == str(tmp_path / "moved")


def test_where_there_is_no_run_nothing_is_brought(storage: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a run at a storage, STORAGE/NAME, with a run\.json, found none"):
        mirror.bring(f"{storage}/small", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken_there_is_refused(run: Run, storage: str) -> None:
    mirror.check_free(storage, "other")
    work_on(run)
    with pytest.raises(NameTaken, match=f"found {storage}/small; choose another with --name, or go on with `tuner res"):
        mirror.check_free(storage, "small")


def test_of_a_run_that_was_not_begun_nothing_stays(run: Run, storage: str) -> None:
    run.note(sessions=[])
    with run.locked(), mirrored(run):
        assert owner(run)["host"]
    mirror.check_free(storage, "small")


def test_a_second_ctrl_c_waits_for_nothing(run: Run, monkeypatch) -> None:
    def slow(self: Folder, source: Path, name: str) -> None:
        raise StorageFailed("out of reach")

    monkeypatch.setattr(Folder, "put", slow)
    with pytest.raises(KeyboardInterrupt):
        work_on(run, KeyboardInterrupt())
    assert not owner(run)["released"]


def test_a_verb_for_a_folder_here_says_how_to_bring_one() -> None:
    with pytest.raises(ValueError, match=r"found s3://bucket/small; `tuner resume s3://bucket/small` brings it"):
        runs.load("s3://bucket/small")


def test_checkpoints_go_only_when_the_journal_that_needs_them_no_more_is_there(run: Run, monkeypatch) -> None:
    order: list[str] = []
    put, remove = Folder.put, Folder.remove

    def note_put(self: Folder, source: Path, name: str) -> None:
        order.append(name)
        put(self, source, name)

    def note_removal(self: Folder, names: list[str]) -> None:
        order.extend(f"-{name}" for name in names)
        remove(self, names)

    (run.directory / "selection.json").write_bytes(b"{}")
    with run.locked(), mirrored(run) as found:
        assert found.flush(30)
        monkeypatch.setattr(Folder, "put", note_put)
        monkeypatch.setattr(Folder, "remove", note_removal)
        (run.directory / "study.journal").write_bytes(b"{}\n")
        (run.directory / "records.jsonl").write_bytes(b"{}\n")
        (run.directory / "selection.json").unlink()
        found.later(lambda: order.append("prune"))
        assert found.flush(30)
    assert order == ["study.journal", "-selection.json", "records.jsonl", "prune"]


def test_what_cannot_be_done_at_a_storage_is_said_and_stops_no_mirror(run: Run, caplog) -> None:
    def fail() -> None:
        raise FileNotFoundError("gone by now")

    with run.locked(), mirrored(run) as found:
        found.later(fail)
        (run.directory / "records.jsonl").write_bytes(b"{}\n")
        assert found.flush(30)
    assert there(run)["records.jsonl"] == b"{}\n"
    assert "FileNotFoundError: gone by now" in caplog.text


def test_what_somebody_else_put_there_stays(run: Run) -> None:
    work_on(run)
    (Folder(str(run.options.storage)) / run.name).write("notes.txt", b"mine")
    (run.directory / "splits.json").unlink()
    work_on(run)
    assert there(run)["notes.txt"] == b"mine"
    assert "splits.json" not in there(run)


def test_a_folder_that_does_not_know_of_an_opening_is_refused(run: Run) -> None:
    work_on(run)
    folder = Folder(str(run.options.storage)) / run.name
    folder.write("evaluation/openings.jsonl", b'{"time": "now"}\n')
    owned_by(run, "another", released=True)
    with pytest.raises(ValueError, match="must know of each opening of the test split"):
        work_on(run)
    assert owner(run)["session"] == "another"
    (run.directory / "evaluation").mkdir()
    (run.directory / "evaluation/openings.jsonl").write_bytes(b'{"time": "now"}\n')
    work_on(run)


def test_one_that_came_back_to_life_since_it_was_looked_at_is_looked_at_again(run: Run, tmp_path, waits) -> None:
    work_on(run)
    owned_by(run, "another", count=3)
    brought = runs.load(mirror.bring(f"{run.options.storage}/small", tmp_path / "elsewhere"))
    owned_by(run, "another", count=4)
    work_on(brought)
    assert waits == [50, 50]


@pytest.mark.parametrize(("storage", "runs_at"), [("runs", "runs"), ("runs/small", "runs"), (".", "small")])
def test_no_run_is_mirrored_on_to_itself(data: Path, tmp_path: Path, storage: str, runs_at: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    storage = str(tmp_path / "link" / storage)
    made = runs.create(small_space(), data, tmp_path / runs_at, options=Options(storage=storage))
    with pytest.raises(ValueError, match="must lie apart from its own folder"):
        work_on(made)
    assert not list(tmp_path.rglob("owner.json"))


def test_a_search_on_to_itself_is_refused_before_it_begins(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must lie apart from its own folder"):
        run_search(small_space(), data, runs=tmp_path / "runs", storage=str(tmp_path / "runs"))
    assert not (tmp_path / "runs/small").exists()


def test_a_name_at_a_storage_does_not_lead_out_of_the_folder(wire: s3.Wire, run: Run, tmp_path: Path) -> None:
    address = f"s3://bucket/escape-{tmp_path.name}"
    info = json.dumps(run.info | {"options": run.info["options"] | {"storage": address}})
    client = boto3.client("s3")
    for name, body in {"run.json": info, "wandb/../../../escaped": "x"}.items():
        client.put_object(Bucket="bucket", Key=f"{address[12:]}/small/{name}", Body=body.encode())
    with pytest.raises(StorageFailed, match="which would lie outside of"):
        mirror.bring(f"{address}/small", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("escaped"))


def test_a_relative_path_is_brought_from_and_kept_absolute(data: Path, tmp_path: Path, monkeypatch) -> None:
    run = runs.create(small_space(), data, tmp_path / "runs", options=Options(storage=str(tmp_path / "mount")))
    run.note(sessions=[SESSION])
    work_on(run)
    monkeypatch.chdir(tmp_path)
    brought = runs.load(mirror.bring("mount/small", tmp_path / "elsewhere"))
    assert brought.options.storage == str(tmp_path / "mount")
    with pytest.raises(ValueError, match="whose path is not absolute"):
        mirror.bring("file://mount/small", tmp_path / "again")


def test_what_was_written_for_a_run_that_is_not_begun_goes_unless_it_is_anothers(run: Run, storage: str) -> None:
    run.note(sessions=[])
    folder = Folder(storage) / run.name
    with run.locked(), mirrored(run):
        (folder / "trials").write(".mark", b"x")
    mirror.check_free(storage, "small")
    with run.locked(), mirrored(run):
        (folder / "trials").write(".mark", b"x")
        owned_by(run, "another")
    assert set(folder.files()) == {"owner.json", "trials/.mark"}
