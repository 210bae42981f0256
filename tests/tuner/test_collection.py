"""Collections of trials: joined, added to by several processes, read by the other verbs. Nothing is trained here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import synthetic
from tests.tuner.conftest import ended, small_space
from tuner import cli, collection
from tuner import run as runs
from tuner.options import Options
from tuner.records import Proposal, trial_id
from tuner.run import Run
from tuner.sampler import SearchStudy
from tuner.space import Space
from tuner.status import describe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collection") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


def record(run: Run, number: int, status: str = "completed", value: float | None = 0.5, **params: Any) -> dict:
    params = {"learning_rate": 1.0, "threshold_rule": "grid"} | params
    config = run.space.config(params, run.space.seed)
    proposal = Proposal(trial_id(run.info["id"], number), number, params, config, False)
    return ended(proposal, status, value, ended=10.0)


def add(run: Run, **more: Any) -> dict:
    with collection.reserved(run) as (number, _):
        made = record(run, number, **more)
        collection.add(run, made)
    return made


def test_the_first_trial_makes_the_collection_and_the_others_join_it(data: Path, tmp_path: Path) -> None:
    first = collection.join(small_space(), data, tmp_path)
    assert first.directory == tmp_path / "small-trials"
    info = first.info
    assert (info["kind"], info["state"], info["options"], info["sessions"]) == ("trials", "finished", {}, [])
    cheaper = small_space(budget={"trials": 1}, sampler="random", scheduler="none")
    second = collection.join(cheaper, data, tmp_path)
    assert (second.info, second.splits()) == (info, first.splits())
    assert runs.load(first.directory).kind == "trials"
    other = collection.join(small_space(seed=1), data, tmp_path, "other")
    assert other.directory == tmp_path / "other"


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"search": {}}, {"train": {"width": 0.2}}, {"objective": {"metric": "iou_mean"}}], ids=str
)
def test_another_space_is_refused(data: Path, tmp_path: Path, other: dict) -> None:
    run = collection.join(small_space(), data, tmp_path)
    before = run.info
    with pytest.raises(
        ValueError,
        match=rf"all trials of a collection must be of one space, fingerprint {before['space_fingerprint']} in "
        rf"{run.directory}, found \w+; name another collection with --name",
    ):
        collection.join(small_space(**other), data, tmp_path)
    assert run.info == before


def test_other_data_are_refused_and_data_that_moved_are_not(data: Path, tmp_path: Path) -> None:
    run = collection.join(small_space(), data, tmp_path)
    found = run.splits()
    synthetic.write(tmp_path / "other", count=24, height=64, width=128, seed=1)
    other = collection.join(small_space(), tmp_path / "other", tmp_path)
    with pytest.raises(ValueError, match=r"missing or changed:(\n.*)*, or name another collection with --name"):
        other.check_files(other.splits().train)
    shutil.copytree(data, tmp_path / "moved")
    moved = collection.join(small_space(), tmp_path / "moved", tmp_path)
    moved.check_files(moved.splits().train)
    assert run.info["data_path"] == str(data)  # each trial says where it found them
    assert run.splits() == found


def test_a_search_is_no_collection(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path, "mine", Options(wandb="off"))
    assert (run.kind, run.info["kind"]) == ("search", "search")
    with pytest.raises(ValueError, match=rf"found the search {run.directory}; choose another name with --name"):
        collection.join(small_space(), data, tmp_path, "mine")
    info = run.info
    del info["kind"]  # of a version that knew no other
    (run.directory / "run.json").write_text(json.dumps(info))
    assert runs.load_search(run.directory).kind == "search"


def test_a_number_is_given_once(data: Path, tmp_path: Path) -> None:
    run = collection.join(small_space(), data, tmp_path)
    with collection.reserved(run) as (first, folder), collection.reserved(run) as (second, _):
        assert (first, second) == (0, 1)
        assert folder == run.directory / "trials" / "attempt-1" / f"{run.info['id']}-0000"
        assert run.count_writers() == describe(run)["running"] == 2
        assert describe(run)["state"] == "running"
    assert not run.is_running()
    made = add(run)  # the other two were killed
    assert made["number"] == 2
    shutil.rmtree(run.directory / "trials")  # by somebody who needs the room
    assert [add(run)["number"] for _ in range(3)] == [0, 1, 3]


JOIN = """
import sys
from pathlib import Path
from tests.tuner.conftest import small_space
from tests.tuner.test_collection import add
from tuner import collection
print(flush=True)
sys.stdin.readline()
run = collection.join(small_space(), sys.argv[1], Path(sys.argv[2]))
for n in range(20):
    add(run, value=n / 100)
print(run.info["id"])
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_processes_that_begin_at_once_make_one_collection_and_lose_no_record(data: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, str(data), str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("now\n")
        process.stdin.flush()
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    run = runs.load(tmp_path / "small-trials")
    assert sorted(record["number"] for record in run.records) == list(range(60))
    assert sorted(record["value"] for record in run.records) == sorted(n / 100 for n in range(20) for _ in range(3))
    assert [path.name for path in tmp_path.iterdir()] == ["small-trials"]
    assert not list(run.directory.glob(".*"))


def test_the_state_of_a_collection(data: Path, tmp_path: Path, capsys) -> None:
    run = collection.join(small_space(), data, tmp_path)
    assert describe(run)["elapsed_seconds"] == 0.0
    for value, status in ((0.25, "completed"), (0.75, "completed"), (None, "failed")):
        add(run, value=value, status=status)
    found = describe(run)
    assert {key: found[key] for key in ("state", "trials", "completed", "failed", "running")} == {
        "state": "finished", "trials": 3, "completed": 2, "failed": 1, "running": 0,
    }  # fmt: skip
    assert found["best"]["trial"] == f"{run.info['id']}-0001"
    assert (found["elapsed_seconds"], found["remaining_seconds"]) == (30.0, 0.0)
    assert cli.main(["status", str(run.directory)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0.5 minutes used"


@pytest.mark.parametrize("verb", ["resume", "finals", "report", "dashboard"])
def test_what_needs_a_search_says_so(data: Path, tmp_path: Path, capsys, verb: str) -> None:
    run = collection.join(small_space(), data, tmp_path)
    add(run)
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    assert cli.main([verb, str(run.directory)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"tuner {verb}: {run.directory} must be the folder of a search, found a collection of trials, which has no study, "
        f"no end and no winner; `tuner search SPACE --warm-start {run.directory}` lets a search know them\n"
    )
    assert {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()} == before


def narrower(space: Space) -> Space:
    document = yaml.safe_load(yaml.safe_dump(space.to_dict()))
    document["search"]["learning_rate"] |= {"low": 0.5}
    return small_space(search=document["search"])


def test_a_search_knows_the_completed_trials_of_a_collection(data: Path, tmp_path: Path) -> None:
    run = collection.join(small_space(), data, tmp_path / "runs")
    for rate, status in ((0.25, "completed"), (1.0, "completed"), (1.5, "diverged"), (2.0, "completed")):
        add(run, learning_rate=rate, status=status, value=None if status == "diverged" else rate / 4)
    study = SearchStudy(narrower(small_space()), "abc123", tmp_path / "study.journal")
    assert study.warm_start(runs.load(run.directory).records) == (2, 1)
    known = study._study.get_trials()
    assert [(trial.params["learning_rate"], trial.value) for trial in known[-2:]] == [(1.0, 0.25), (2.0, 0.5)]
    assert study.records() == []
