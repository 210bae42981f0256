import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from model import layouts, splits, synthetic
from tests.tuner.conftest import ended, small_space
from tuner import pipeline
from tuner import run as runs
from tuner.options import STUDY_VARIABLE, Options
from tuner.records import RecordsFile
from tuner.sampler import SearchStudy
from tuner.space import fingerprint_of
from tuner.status import describe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


def test_a_new_run_says_what_it_is(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path, options=Options(trials=7, seed=5))
    info = run.info
    assert run.directory == tmp_path / "small"
    assert info["space"]["budget"] == {"trials": 7}
    assert info["space"]["seed"] == 5
    assert info["data"]["train"]["positive"] + info["data"]["test"]["positive"] < 24
    assert len(info["id"]) == 6
    assert info["versions"]["ray"] == "2.60.0"
    again = runs.load(run.directory)
    assert again == run
    assert again.splits() == run.splits()


def test_a_name_that_exists_is_refused(data: Path, tmp_path: Path) -> None:
    runs.create(small_space(), data, tmp_path, "one")
    with pytest.raises(ValueError, match=r"a run's name must be new, found .*one; choose another with --name"):
        runs.create(small_space(), data, tmp_path, "one")


def test_a_name_may_not_leave_the_folder(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a run's name must be letters, digits, - and _"):
        runs.create(small_space(), data, tmp_path, "../one")


def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        runs.create(small_space(), tmp_path / "nowhere", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_more_masks_than_there_are(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_segmented must be at most"):
        runs.create(small_space(train={"num_segmented": 500}), data, tmp_path)


def test_a_decision_needs_negatives(crackforest: Path, tmp_path: Path) -> None:
    space = small_space(objective={"metric": "decision_ap"})
    with pytest.raises(ValueError, match="objective decision_ap needs images without a defect, found none"):
        runs.create(space, crackforest, tmp_path)


def test_an_epoch_by_decision_needs_negatives(crackforest: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="best_by decision or both needs images without a defect, found none"):
        runs.create(small_space(train={"best_by": "both"}), crackforest, tmp_path)


def test_splits_of_another_run_are_refused(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path)
    other = runs.create(small_space(seed=1), data, tmp_path, "other")
    shutil.copy(other.directory / "splits.json", run.directory)
    with pytest.raises(ValueError, match=r"small/splits\.json: must hold the splits .* start a new run"):
        run.splits()


def test_the_splits_stay_whatever_becomes_of_the_data(data: Path, tmp_path: Path) -> None:
    """Neither the layout nor a file is looked at again."""
    shutil.copytree(data, tmp_path / "set")
    run = runs.create(small_space(), tmp_path / "set", tmp_path)
    before = run.splits()
    samples = layouts.read(tmp_path / "set")
    assert before == splits.assign(samples, tmp_path, 0.25, 0.25, run.space.seed)
    shutil.rmtree(tmp_path / "set")
    assert runs.load(run.directory).splits() == before
    with pytest.raises(ValueError, match=r"there is no folder \S+set; .* say with --data where the same data lie now"):
        run.verify(before.train)


def test_a_sample_that_changed_is_named_when_it_is_to_be_used(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "set")
    run = runs.create(small_space(), tmp_path / "set", tmp_path)
    found = run.splits()
    for sample in found.test:
        sample.image.write_bytes(b"garbage")
        sample.mask.unlink()
    run.verify(found.train + found.validation)
    count = len(found.test)
    with pytest.raises(ValueError, match=rf"found {2 * count} of {2 * count} files missing or changed:\n  {tmp_path}"):
        run.verify(found.test)


def test_data_that_moved_are_found_where_they_are_said_to_be(data: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(data, tmp_path / "set")
    run = runs.create(small_space(), tmp_path / "set", tmp_path)
    (tmp_path / "set").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        runs.load("small", "nowhere").verify(run.splits().train)
    assert run.info["data_path"] == str(tmp_path / "set")  # not before the digests have said so
    moved = runs.load("small", "moved")
    moved.verify(moved.splits().train)
    assert run.info["data_path"] == str(tmp_path / "moved")
    again = runs.load("small")
    assert (again.data, again.splits()) == (moved.data, moved.splits())


def test_the_synthetic_set_is_made_again_where_it_is_gone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    run = runs.create(small_space(), "synthetic", tmp_path / "runs")
    found = run.splits()
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "other cache"))
    assert run.splits().train[0].image.is_relative_to(tmp_path / "other cache")
    run.verify(run.splits().train)
    monkeypatch.setenv("SEGDEC_TUNER_CACHE", str(tmp_path / "cache"))
    assert run.splits() == found
    found.train[0].image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"remove \S+synthetic-64x128-\w+, which is then made again"):
        run.verify(found.train)
    shutil.rmtree(run.data_folder)
    run.verify([*found.train, *found.validation, *found.test])
    assert run.info["data_path"] == "synthetic"


def test_the_layout_that_was_found_is_said(data: Path, tmp_path: Path) -> None:
    auto = runs.create(small_space(), data, tmp_path, "auto")
    assert auto.info["data"]["layout"] == "images_masks"
    assert auto.info["space"]["data"].get("layout", "auto") == "auto"  # what was asked for stays


def test_one_process_writes(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path)
    assert not run.is_running()
    with run.locked():
        assert run.is_running()
        with pytest.raises(ValueError, match="is written by another process"), run.locked():
            pass
    with run.locked():
        pass


def test_somebody_who_looks_keeps_no_writer_out(data: Path, tmp_path: Path) -> None:
    """A look holds the lock for a moment; here a moment of a tenth of a second."""
    run = runs.create(small_space(), data, tmp_path)
    looking = threading.Event()

    def look() -> None:
        with (run.directory / "run.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            looking.set()
            time.sleep(0.1)

    watcher = threading.Thread(target=look)
    watcher.start()
    looking.wait()
    with run.locked():
        assert run.is_running()
    watcher.join()


def test_a_run_is_called_by_its_folder_wherever_it_is_opened_from(data: Path, tmp_path: Path, monkeypatch) -> None:
    run = runs.create(small_space(), data, tmp_path)
    monkeypatch.chdir(run.directory)
    assert runs.load(".") == run
    assert runs.load(".").name == "small"
    assert runs.load("trials/..").name == "small"
    monkeypatch.chdir(tmp_path)
    assert runs.load("small").directory == Path("small")  # messages say it as the user does


def test_where_the_study_lies_is_kept_and_no_password_is(data: Path, tmp_path: Path, monkeypatch) -> None:
    run = runs.create(small_space(), data, tmp_path, "one")
    assert run.study == run.directory / "study.journal"
    url = f"sqlite:///{tmp_path}/study.db"
    assert runs.load(runs.create(small_space(), data, tmp_path, "two", Options(study=url)).directory).study == url

    monkeypatch.setenv(STUDY_VARIABLE, "postgresql://me:hunter2@host/db")
    run = runs.create(small_space(), data, tmp_path, "three", Options(study="env"))
    assert runs.load(run.directory).study == "postgresql://me:hunter2@host/db"
    assert b"hunter2" not in b"".join(path.read_bytes() for path in run.directory.iterdir())
    monkeypatch.delenv(STUDY_VARIABLE)
    with pytest.raises(ValueError, match=f"environment variable {STUDY_VARIABLE} says, and it is not set"):
        _ = runs.load(run.directory).study


def test_options_that_somebody_spoilt_are_refused(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path)
    run.note(options=run.info["options"] | {"concurrent": 0})
    with pytest.raises(ValueError, match=r"small must be the folder of a run.*concurrent must be a whole number"):
        runs.load(run.directory)


@pytest.mark.parametrize("study", [None, "sqlite:////nowhere/study.db"])
def test_a_killed_session_ended_when_it_last_wrote(data: Path, tmp_path: Path, study: str | None) -> None:
    run = runs.create(small_space(), data, tmp_path, options=Options(study=study))
    assert run.last_written() == 0
    written = run.directory / ("trials/attempt-1/x-0001" if study else "study.journal")
    written.mkdir(parents=True)
    os.utime(written, (1000, 2000))
    assert run.last_written() == 2000
    run.note(sessions=[{"started": 1500.0, "ended": None}])
    assert describe(run)["elapsed_seconds"] == 500


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        ({"device_hours": 1.0}, 900.0),  # 2400 of 3600 device-seconds in 1800 s
        ({"money": 6.0, "price_per_device_hour": 6.0}, 900.0),
        ({"device_hours": 1.0, "money": 6.0, "price_per_device_hour": 9.0}, 0.0),
        ({"trials": 3, "device_hours": 100.0}, 900.0),
        ({"hours": 0.6, "device_hours": 1.0}, 360.0),
    ],
    ids=str,
)
def test_the_time_left_obeys_every_limit(data: Path, tmp_path: Path, budget: dict, left: float) -> None:
    run = runs.create(small_space(budget=budget), data, tmp_path)
    run.note(sessions=[{"started": 0.0, "ended": 1800.0}])
    if "hours" not in budget:
        assert describe(run)["remaining_seconds"] is None
    study = SearchStudy(run.space, "abc123", None)
    for _ in range(2):
        proposal = study.ask()
        study.finish(proposal, ended(proposal, ended=900.0, device_seconds=1200.0))
    RecordsFile(run.directory).write(study.records())
    assert describe(run)["remaining_seconds"] == pytest.approx(left)


@pytest.mark.parametrize("part", ["data", "train", "search", "objective", "seed"])
def test_a_space_that_was_changed_is_refused(data: Path, tmp_path: Path, part: str) -> None:
    """It would be another study, whose few records would replace those of the first."""
    run = runs.create(small_space(), data, tmp_path)
    others = {
        "data": {"validation_share": 0.3}, "train": {"epochs": 4}, "search": {"dilate": {"type": "int", "low": 1, "high": 1}},
        "objective": {"metric": "iou_mean"},
    }  # fmt: skip
    space = run.info["space"]
    run.note(space=space | {part: 7 if part == "seed" else space[part] | others[part]})
    with pytest.raises(
        ValueError,
        match=rf"small/run\.json must be the one .* fingerprint {small_space().fingerprint()}, found \w+; restore it; .*--warm-start {run.directory}`",
    ):
        runs.load(run.directory)
    run.note(space=space)
    assert runs.load(run.directory) == run


def test_what_is_spent_may_be_changed(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path)
    run.note(space=run.info["space"] | {"budget": {"trials": 9}, "sampler": "random", "scheduler": "asha"})
    assert runs.load(run.directory).space.budget.trials == 9


def test_a_version_with_another_default_cannot_go_on(data: Path, tmp_path: Path) -> None:
    """It can be looked at and started from: what is written down is what was searched."""
    run = runs.create(small_space(), data, tmp_path)
    older = run.info["space"]
    del older["data"]["layout"]
    run.note(space=older, space_fingerprint=fingerprint_of(older))
    with pytest.raises(ValueError, match=r"was made by segdec-tuner \S+, found \S+; go on with .* `--warm-start"):
        pipeline.go_on(runs.load(run.directory))
    assert not (run.directory / "study.journal").exists()
    again = runs.create(small_space(), data, tmp_path, "again", Options(warm_start=str(run.directory)))
    assert describe(runs.load(again.options.warm_start))["state"] == "stopped"


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the folder of a run"):
        runs.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match="must be the folder of a run"):
        runs.load(tmp_path)
