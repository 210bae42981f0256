"""A real optuna-dashboard over HTTP, on a real journal that a search goes on writing to."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model import synthetic
from tests.conftest import heeds_ctrl_c
from tests.tuner.conftest import ended, small_space
from tuner import cli
from tuner import run as runs
from tuner.options import Options
from tuner.run import Run
from tuner.sampler import SearchStudy, study_name
from tuner.tracking import dashboard

ROOT = Path(__file__).parents[3]
PNG = b"\x89PNG of a crack"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dashboard") / "set"
    synthetic.write(folder, count=24, height=64, width=128)
    return folder


@pytest.fixture(params=["journal", "sqlite"])
def run(request, data: Path, tmp_path: Path) -> Run:
    url = None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"
    return runs.create(small_space(), data, tmp_path / "runs", options=Options(study=url))


@pytest.fixture
def small(data: Path, tmp_path: Path) -> Run:
    """A run with a journal."""
    return runs.create(small_space(), data, tmp_path / "runs")


@pytest.fixture
def show() -> Iterator[Callable[[Run], str]]:
    """Serves runs; the URL of a study's page."""
    served = []

    def start(run: Run) -> str:
        made, url = dashboard.server(run, study_name(run.space, run.info["id"], run.study), 0)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.append((made, thread))
        return url

    yield start
    for made, thread in served:
        made.shutdown()
        thread.join()
        made.server_close()


def begin(run: Run) -> SearchStudy:
    return SearchStudy(run.space, run.info["id"], run.study)


def ask(method: str, url: str, body: Any = None) -> bytes:
    assert url.startswith("http://127.0.0.1:")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return answer.read()


def get(url: str) -> bytes:
    return ask("GET", url)


def of_api(url: str) -> dict[str, Any]:
    return json.loads(get(url.replace("/dashboard/", "/api/")))


def attributes(trial: dict[str, Any]) -> dict[str, str]:
    return {one["key"]: one["value"] for one in trial["user_attrs"]}


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_previews(run: Run, trial: str, checkpoint: int, count: int = 2, at: float = 100.0) -> None:
    folder = run.directory / "trials" / "attempt-1" / trial / f"checkpoint_{checkpoint:06d}" / "previews"
    folder.mkdir(parents=True)
    for n in range(count):
        (folder / f"{n}.png").write_bytes(PNG + bytes([checkpoint, n]))
    os.utime(folder, (at, at))


def test_trials_are_shown_with_names_and_notes(run: Run, show) -> None:
    study = begin(run)
    first, second, third = study.ask(), study.ask(), study.ask()
    study.report(second.number, 1, 0.25)
    thresholds = {"rule": "grid", "factor": 1, "segmentation_probability": 0.625, "decision_probability": None}
    study.finish(first, ended(first, value=0.75, thresholds=thresholds))
    study.finish(second, ended(second, "stopped_early", 0.25, reason="*behind* at <epoch> 1"))
    found = of_api(show(run))
    assert found["objective_names"] == ["dice_mean"]
    assert found["directions"] == ["maximize"]
    assert [trial["state"] for trial in found["trials"]] == ["Complete", "Pruned", "Running"]
    best, stopped, running = found["trials"]
    assert best["values"] == [0.75]
    assert [trial["number"] for trial in found["best_trials"]] == [0]
    assert attributes(best) == {
        "trial": first.trial, "status": "completed", "value": "0.75", "best_epoch": "1", "epochs": "3",
        "seconds": "10.0", "threshold": "0.625", "drawn": "given",
    }  # fmt: skip
    assert attributes(running) == {"trial": third.trial, "drawn": "random"}
    assert stopped["intermediate_values"] == [{"step": 1, "value": 0.25}]
    assert best["note"]["body"] == (
        "**completed**\n\n- best epoch 1 of 3, value 0.7500\n- thresholds by `grid`, factor 1: pixels 0.625\n- 10 s of training"
    )
    assert stopped["note"]["body"].startswith("**stopped early**: \\*behind\\* at \\<epoch\\> 1\n")
    assert running["note"]["body"] == ""
    assert f"tuner resume {run.directory}" in found["note"]["body"]
    assert "budget: trials 4." in found["note"]["body"]


def test_it_is_live(run: Run, show) -> None:
    study = begin(run)
    first = study.ask()
    url = show(run)
    assert [trial["state"] for trial in of_api(url)["trials"]] == ["Running"]
    study.finish(first, ended(first, value=0.75))
    study.ask()
    deadline = time.monotonic() + 15  # optuna-dashboard keeps what it has read for two seconds
    while len(found := of_api(url)["trials"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [trial["state"] for trial in found] == ["Complete", "Running"]
    assert found[0]["note"]["body"].startswith("**completed**")


def test_a_held_trial_is_said_to_be_held(run: Run, show) -> None:
    study = begin(run)
    study.finish(first := study.ask(), ended(first))
    study.report((second := study.ask()).number, 1, 0.25)
    study.hold(second, ended(second, "stopped_early", 0.25, reason="held at epoch 1"))
    held = of_api(show(run))["trials"][1]
    assert held["state"] == "Running"
    assert attributes(held)["status"] == "held"
    assert held["note"]["body"].startswith("**held**: held at epoch 1")
    study.let_go(for_good=True)
    stopped = of_api(show(run))["trials"][1]
    assert (stopped["state"], attributes(stopped)["status"]) == ("Pruned", "stopped_early")


def test_a_record_in_parts_is_read(small: Run, show) -> None:
    study = begin(small)
    study._longest = 100  # as in a database with short columns
    study.finish(first := study.ask(), ended(first, value=0.75))
    (trial,) = of_api(show(small))["trials"]
    assert attributes(trial)["value"] == "0.75"
    assert not [key for key in attributes(trial) if key.startswith("record")]


def test_two_objectives_have_a_front(data: Path, tmp_path: Path, show) -> None:
    space = small_space(objective=[{"metric": "dice_mean"}, {"metric": "device_seconds"}])
    run = runs.create(space, data, tmp_path / "runs")
    study = begin(run)
    for value, seconds in ((0.5, 20.0), (0.25, 10.0), (0.375, 30.0)):
        study.finish(proposal := study.ask(), ended(proposal, value=value, device_seconds=seconds))
    found = of_api(show(run))
    assert found["objective_names"] == ["dice_mean", "device_seconds"]
    assert found["directions"] == ["maximize", "minimize"]
    assert [trial["values"] for trial in found["best_trials"]] == [[0.5, 20.0], [0.25, 10.0]]


def test_the_best_trial_meets_the_constraints_and_is_of_this_search(data: Path, tmp_path: Path, show) -> None:
    run = runs.create(small_space(constraints=[{"metric": "recall", "min": 0.5}]), data, tmp_path / "runs")
    study = begin(run)

    def judged(value: float, recall: float) -> dict[str, Any]:
        proposal = study.ask()
        record = ended(proposal, value=value, history=[{"epoch": 1, "recall": recall}])
        study.finish(proposal, record)
        return record

    other = judged(0.75, 0.25)
    url = show(run)
    assert [trial["number"] for trial in of_api(url)["best_trials"]] == [0]  # for want of another
    judged(0.5, 0.75)
    params = {"learning_rate": 0.5, "threshold_rule": "grid"}
    study.warm_start([other | {"trial": "other-1", "value": 0.9, "config": other["config"] | params,
                               "history": [{"epoch": 1, "recall": 1.0}]}])  # fmt: skip
    found = of_api(show(run))
    assert [trial["constraints"] for trial in found["trials"]] == [[0.25], [-0.25], [-0.5]]
    assert [trial["number"] for trial in found["best_trials"]] == [1]


def test_a_baseline_outside_the_space_is_in_the_note(data: Path, tmp_path: Path, show) -> None:
    search = {"learning_rate": {"type": "float", "low": 0.1, "high": 0.5}}
    run = runs.create(small_space(search=search), data, tmp_path / "runs")
    study = begin(run)
    study.finish(baseline := study.ask(), ended(baseline, value=0.4375))
    found = of_api(show(run))
    assert found["trials"] == []
    assert "outside the space: **completed**\n\n- best epoch 1 of 3, value 0.4375" in found["note"]["body"]
    assert found["user_attrs"] == []


def test_previews_are_those_of_the_newest_checkpoint(small: Run, show) -> None:
    study = begin(small)
    first, second, third = study.ask(), study.ask(), study.ask()
    with_previews(small, first.trial, 1)
    url = show(small)
    old = of_api(url)["trials"][0]["artifacts"][0]["artifact_id"]
    with_previews(small, f"{first.trial}.1", 2, at=200.0)  # its worker died once
    with_previews(small, second.trial, 1, at=200.0)
    with_previews(small, second.trial, 2)
    again = show(small)
    trials = of_api(again)["trials"]
    assert [picture["filename"] for picture in trials[0]["artifacts"]] == ["preview-0.png", "preview-1.png"]
    assert trials[third.number]["artifacts"] == []

    def picture(number: int, artifact: str) -> bytes:
        of_trial = again.replace("/dashboard/studies/", "/artifacts/") + f"/{trials[number]['trial_id']}"
        return get(f"{of_trial}/{artifact}")

    shown = [[one["artifact_id"] for one in trial["artifacts"]] for trial in trials]
    assert [picture(0, one) for one in shown[0]] == [PNG + bytes([2, 0]), PNG + bytes([2, 1])]
    assert [picture(1, one) for one in shown[1]] == [PNG + bytes([1, 0]), PNG + bytes([1, 1])]
    with pytest.raises(urllib.error.HTTPError) as gone:
        picture(0, old)
    assert gone.value.code == 404


def test_nothing_can_be_changed(small: Run, show) -> None:
    study = begin(small)
    study.finish(first := study.ask(), ended(first))
    study.ask()
    with_previews(small, first.trial, 1)
    url = show(small)
    picture = of_api(url)["trials"][0]["artifacts"][0]["artifact_id"]
    before = files(small.directory)
    api = url.split("/dashboard")[0] + "/api"
    note = {"version": 2, "body": "mine"}
    for method, path, body in [
        ("DELETE", "/studies/0", {}),
        ("POST", "/studies", {"study_name": "mine", "directions": ["minimize"]}),
        ("POST", "/studies/0/rename", {"study_name": "mine"}),
        ("PUT", "/studies/0/note", note),
        ("PUT", "/studies/0/0/note", note),
        ("POST", "/trials/1/tell", {"state": "Fail"}),
        ("POST", "/trials/1/user-attrs", {"user_attrs": {"mine": 1}}),
        ("POST", "/artifacts/0", {"file": "data:text/plain;base64,bWluZQ==", "filename": "mine"}),
        ("POST", "/artifacts/0/1", {"file": "data:text/plain;base64,bWluZQ==", "filename": "mine"}),
        ("DELETE", f"/artifacts/0/0/{picture}", {}),
        ("PATCH", "/studies/0", {}),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(method, api + path, body)
        assert refused.value.code == 405, path
        assert "can be changed" in json.loads(refused.value.read())["reason"]
    for path in ("/studies", "/studies/0", "/studies/0/param_importances", "/meta"):
        get(api + path)
    get(url)
    get(url.replace("/dashboard/studies/", "/csv/"))
    assert files(small.directory) == before


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["127.0.0.1:{port}"], 200),
        (["127.0.0.1"], 200),
        (["localhost:{port}"], 200),
        (["LocalHost"], 200),
        (["localhost:1234"], 200),  # as with a port that ssh forwards
        (["[::1]:{port}"], 200),
        (["[::1]"], 200),
        (["evil.example:{port}"], 403),
        (["127.0.0.1.evil.example:{port}"], 403),
        (["localhost.evil.example"], 403),
        (["evil.example/localhost"], 403),
        (["127x0.0.1"], 403),
        (["127.0.0.1:"], 403),
        (["127.0.0.1:{port}@evil.example"], 403),
        (["::1"], 403),
        (["0.0.0.0:{port}"], 403),
        (["localhost", "evil.example"], 403),
        ([""], 403),
        ([], 403),
    ],
    ids=str,
)
def test_only_who_asks_for_this_machine_is_answered(small: Run, show, hosts: list[str], status: int) -> None:
    """What a browser sends that another page has led here, by a name of its own for 127.0.0.1."""
    begin(small).ask()
    port = int(show(small).split(":")[2].split("/")[0])
    for method, path in (("GET", "/api/studies"), ("GET", "/dashboard"), ("DELETE", "/api/studies/0")):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Accept-Encoding", "identity")
        for host in hosts:
            connection.putheader("Host", host.format(port=port))
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == (405 if status == 200 and method == "DELETE" else status)
        if status == 403:
            assert body == b"this page must be opened as 127.0.0.1 or localhost"


def test_the_view_itself_cannot_be_written_through(small: Run) -> None:
    """So that a way to write by GET, in a later optuna-dashboard, would find nothing to write to."""
    begin(small).ask()
    before = files(small.directory)
    view = dashboard.View(small, study_name(small.space, small.info["id"], small.study))
    names = [name for name in dir(view) if name.startswith(("set_", "create_", "delete_"))]
    assert len(names) == 10
    for name in names:
        with pytest.raises(TypeError, match="nothing in it can be changed"):
            getattr(view, name)(0, "key", 1)
    assert files(small.directory) == before


def test_other_studies_of_a_database_are_not_shown(data: Path, tmp_path: Path, show) -> None:
    options = Options(study=f"sqlite:///{tmp_path}/study.db")
    one, two = (runs.create(small_space(), data, tmp_path / "runs", name, options) for name in ("one", "two"))
    begin(one).ask()
    begin(two).ask()
    url = show(two)
    (listed,) = json.loads(get(url.split("/dashboard")[0] + "/api/studies"))["study_summaries"]
    assert listed["study_name"].endswith(two.info["id"])
    for path in ("/api/studies/1", "/api/studies/1/param_importances", "/csv/1"):
        with pytest.raises(urllib.error.HTTPError) as missing:
            get(url.split("/dashboard")[0] + path)
        assert missing.value.code == 404, path


def message(capsys, *arguments: str) -> str:
    assert cli.main(["dashboard", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def test_what_cannot_be_shown_is_one_message(run: Run, capsys, monkeypatch, tmp_path: Path) -> None:
    here = str(run.directory)
    assert "must be the folder of a run" in message(capsys, str(tmp_path / "nowhere"))
    if isinstance(run.study, str):
        SearchStudy(run.space, "other1", run.study)
    before = files(tmp_path)
    assert f"found none yet; `tuner resume {here}` begins it" in message(capsys, here)
    assert files(tmp_path) == before
    begin(run)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"found {port}: Address already in use; choose another with --port" in message(
            capsys, here, "--port", port
        )
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert "pip install 'segdec-tuner[dashboard]'" in message(capsys, here)


def test_a_port_that_is_none(small: Run, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["dashboard", str(small.directory), "--port", "65536"])
    assert stop.value.code == 2
    assert "must be a port, a whole number from 0 to 65535, found '65536'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_command_serves_until_ctrl_c(small: Run) -> None:
    begin(small).ask()
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner", "dashboard", str(small.directory), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        preexec_fn=heeds_ctrl_c,
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert [trial["state"] for trial in of_api(url)["trials"]] == ["Running"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_shows_the_page(small: Run, show, tmp_path: Path) -> None:
    study = begin(small)
    study.finish(first := study.ask(), ended(first, value=0.75))
    page = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}/browser",
         "--virtual-time-budget=8000", "--dump-dom", show(small)],
        capture_output=True, text=True, check=True, timeout=100,
    ).stdout  # fmt: skip
    assert small.space.fingerprint() in page
    assert "dice_mean" in page
    assert "Best Trial (number=0)" in page
