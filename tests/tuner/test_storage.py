"""Databases as a study's place; what every place has in common is in test_conformance.py and test_sampler.py."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.tuner.conftest import ended, small_space
from tuner import storage
from tuner import study as studies
from tuner.options import STUDY_VARIABLE
from tuner.records import SearchFailed
from tuner.sampler import SearchStudy, count_running, study_name


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def test_a_relative_path_is_made_absolute_when_the_search_starts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = storage.checked("sqlite:///100% {mine}.db")
    SearchStudy(small_space(), "abc123", kept).ask()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert count_running(kept, study_name(small_space(), "abc123", kept)) == 1
    assert SearchStudy(small_space(), "abc123", kept, begun=True).ask() is not None
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "100% {mine}.db"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_check_leaves_no_study(url: str) -> None:
    assert storage.checked(url) == url
    assert optuna.get_all_study_names(url) == []


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("sqlite:///{folder}/nowhere/study.db", "unable to open database file; name a file that may be written, in a folder"),
        ("sqlite:///{folder}", "unable to open database file"),
        ("sqlite:///{folder}/run.json", "file is not a database; name a file"),
        ("sqlite:///file:{folder}/there.db?mode=ro&uri=true", "attempt to write a readonly database"),
        ("sqlite:///file:there.db?uri=true", "must hold an absolute path, found file:there.db"),
        ("sqlite://", "the study must outlive the process, found sqlite in memory; name a file"),
        ("sqlite:///:memory:", "the study must outlive the process"),
        ("sqlite:///file:/x?mode=memory&uri=true", "the study must outlive the process"),
        ("mysql+nothing://h/x", "Can't load plugin: sqlalchemy.dialects:mysql.nothing; install the driver's package"),
        ("oracle+oracledb://h/x", "No module named 'oracledb'; install the driver's package"),
        ("mysql://h:port/x", "must have the form dialect://user@host:port/name or sqlite:///path, and cannot be read"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_used_is_refused(tmp_path: Path, study: str, message: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1}) * 100)
    storage.checked(f"sqlite:///{tmp_path}/there.db")
    with pytest.raises(ValueError, match="study") as caught:
        storage.checked(study.format(folder=tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense://me:hunter2@h/x", "nonsense://me:hun{ter}2@h/x", "x://me:hunter2@h:port/x"])
def test_a_password_from_the_environment_is_in_no_message(url: str, monkeypatch) -> None:
    monkeypatch.setenv(STUDY_VARIABLE, url)
    with pytest.raises(ValueError, match="the study's") as caught:
        storage.checked("env")
    assert "hun" not in str(caught.value)
    assert caught.value.__suppress_context__  # nor in a traceback


def test_what_a_driver_repeats_of_the_password_is_struck_out() -> None:
    url = storage._parsed("postgresql://me:hunter2@h/x?sslpassword=swordfish")
    message = str(storage._refusal(url, RuntimeError("cannot log in with hunter2 and swordfish")))
    assert "cannot log in with *** and ***;" in message


def test_a_database_that_fails_in_the_middle_is_told_with_its_reason(url: str, tmp_path: Path) -> None:
    study = SearchStudy(small_space(), "abc123", url)
    study._storage._backend.engine.dispose()
    (tmp_path / "study.db").unlink()
    message = r"the study's database failed: no such table: \w+; .*`tuner resume RUN` goes on"
    with pytest.raises(SearchFailed, match=message), storage.explained(url):
        study.ask()


def test_a_path_in_the_environment_must_be_absolute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(STUDY_VARIABLE, "sqlite:///study.db")
    with pytest.raises(ValueError, match=rf"must be absolute.*found study\.db; write sqlite:///{tmp_path}/study\.db"):
        storage.checked("env")
    monkeypatch.setenv(STUDY_VARIABLE, f"sqlite:///{tmp_path}/study.db")
    assert storage.checked("env") == "env"


def test_two_runs_never_share_a_study(url: str) -> None:
    space = small_space()
    first, second = SearchStudy(space, "aaa000", url), SearchStudy(space, "bbb111", url)
    proposal = first.ask()
    first.finish(proposal, ended(proposal))
    assert second.records() == []
    assert second.ask().number == 0
    names = [f"small-{space.fingerprint()}-{run}" for run in ("aaa000", "bbb111")]
    assert optuna.get_all_study_names(url) == names
    assert count_running(url, names[0]) == 0
    assert count_running(url, names[1]) == 1


def test_a_study_that_has_begun_must_be_there(url: str, tmp_path: Path) -> None:
    SearchStudy(small_space(), "aaa000", url)
    SearchStudy(small_space(), "aaa000", url, begun=True)
    with pytest.raises(
        ValueError, match=r"the study small-\w+-bbb111 of this run has begun and is not where it should be"
    ):
        SearchStudy(small_space(), "bbb111", url, begun=True)
    with pytest.raises(ValueError, match=r"the study small-\w+ of this run has begun .* bring its journal back"):
        SearchStudy(small_space(), "aaa000", tmp_path / "study.journal", begun=True)


def test_who_watches_writes_nothing(url: str, tmp_path: Path) -> None:
    database = tmp_path / "study.db"
    name = study_name(small_space(), "abc123", url)
    with pytest.raises(ValueError, match="unable to open database file"):
        count_running(url, name)
    assert not database.exists()
    database.touch()
    with pytest.raises(ValueError, match="no such table"):
        count_running(url, name)
    assert database.read_bytes() == b""
    study = SearchStudy(small_space(train={"width": 0.1, "epochs": 3, "optimizer": "adam"}), "abc123", url)
    baseline, first = study.ask(), study.ask()
    before = database.read_bytes()
    assert count_running(url, study._study.study_name) == 2
    assert count_running(url, "another") == 0
    assert database.read_bytes() == before
    study.finish(baseline, ended(baseline))
    study.put_back(first.number)
    assert count_running(url, study._study.study_name) == 0


def large(proposal, epochs: int = 400) -> dict:
    """A record of some hundred KiB, which is more than MySQL's TEXT takes."""
    rows = [{"epoch": n, "value": 0.1 + n / 7, "compared": 0.1, "why": 'äöü"\\'} for n in range(1, epochs + 1)]
    return ended(proposal, history=rows * 4, epochs=epochs)


@pytest.mark.parametrize("has_long_text", [True, False])
def test_large_records_come_back_as_they_were(url: str, monkeypatch, has_long_text: bool) -> None:
    monkeypatch.setattr(studies, "holds_long_text", lambda _: has_long_text)
    space = small_space(train={"width": 0.1, "epochs": 3, "optimizer": "adam"})  # its baseline is no trial
    study = SearchStudy(space, "abc123", url)
    wanted = []
    for _ in range(2):
        proposal = study.ask()
        wanted.append(large(proposal))
        assert len(json.dumps(wanted[-1])) > 2**16
        study.report(proposal.number, 1, 0.1)
        study.finish(proposal, wanted[-1])
    small = study.ask()
    wanted.append(ended(small))
    study.finish(small, wanted[-1])
    assert study.records() == wanted
    again = SearchStudy(space, "abc123", url)
    assert again.records() == wanted
    assert again.curves() == {0: {1: 0.1}}
    trials = again._study.get_trials(deepcopy=False)
    texts = [json.dumps(value) for trial in trials for value in trial.user_attrs.values()]
    texts += [json.dumps(value) for value in again._study.user_attrs.values()]
    assert (max(len(text.encode()) for text in texts) < 2**16) is not has_long_text


def test_long_text_is_kept_whole_where_it_fits(url: str, tmp_path: Path) -> None:
    for where in (url, tmp_path / "study.journal", None):
        assert storage.holds_long_text(SearchStudy(small_space(), "abc123", where)._storage)


_DRIVER = """
import sys
from tests.tuner.conftest import ended, small_space
from tuner.sampler import SearchStudy
study = SearchStudy(small_space(search={"learning_rate": {"type": "float", "low": 0.1, "high": 2.0}}), "abc123", sys.argv[1])
while True:
    first, second = study.ask(), study.ask()
    for epoch in (1, 2, 3):
        study.report(first.number, epoch, epoch / 10)
        study.report(second.number, epoch, epoch / 10)
    print(first.number, flush=True)
    study.finish(first, ended(first, value=first.params["learning_rate"], replays=[]))
    study.finish(second, ended(second, value=0.1, replays=[]))
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_process_that_is_killed_leaves_a_study_to_go_on_with(url: str) -> None:
    space = small_space(search={"learning_rate": {"type": "float", "low": 0.1, "high": 2.0}})
    known: list[dict] = []
    for n in range(3):
        root = Path(__file__).parents[2]
        driver = subprocess.Popen([sys.executable, "-c", _DRIVER, url], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(3 + n):
            assert driver.stdout.readline()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
        study = SearchStudy(space, "abc123", url, begun=True)
        records = study.records()
        assert records[: len(known)] == known
        assert len(records) > len(known)
        known = records
        trials = study._study.get_trials(deepcopy=False)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.WAITING}
        assert len([trial for trial in trials if trial.state is TrialState.WAITING]) <= 2
        assert [record["number"] for record in records] == [t.number for t in trials if t.state is TrialState.COMPLETE]
