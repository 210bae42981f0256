import json
from pathlib import Path

import pytest

from model import synthetic
from tests.tuner.conftest import small_space
from tuner import run as runs
from tuner.run import Options


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


def test_data_that_changed_are_refused(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path)
    run.note(data=run.info["data"] | {"fingerprint": "other"})
    with pytest.raises(ValueError, match=r"must be what the run began with .fingerprint other"):
        run.splits()


def test_one_process_writes(data: Path, tmp_path: Path) -> None:
    run = runs.create(small_space(), data, tmp_path)
    assert not run.is_running()
    with run.locked():
        assert run.is_running()
        with pytest.raises(ValueError, match="is written by another process"), run.locked():
            pass
    with run.locked():
        pass


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the folder of a run"):
        runs.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match="must be the folder of a run"):
        runs.load(tmp_path)
