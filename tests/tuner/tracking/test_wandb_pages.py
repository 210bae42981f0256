"""The sweep, the workspace and the report of a search, made by wandb itself on a stub of its server on loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tuner.tracking import test_wandb_runs as offline
from tests.tuner.tracking.pages_server import PagesServer
from tuner import cli, space_file
from tuner.space import Objective
from tuner.tracking import wandb_pages
from tuner.tracking.sweep import sweep_config

KEY = offline.KEY
DEMO = space_file.load("demo")
PROGRAM = [sys.executable, "-P", "-m", "tuner.tracking.wandb_pages"]
NOTHING: dict[str, Any] = {"sweep": None, "workspace": None, "report": None}

pytestmark = pytest.mark.timeout(180)

no_network_and_no_home = offline.no_network_and_no_home


@pytest.fixture
def server(monkeypatch) -> Iterator[PagesServer]:
    """Answers, and is where wandb looks."""
    with PagesServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        server.shutdown()
        thread.join()


def request(**parts: Any) -> dict[str, Any]:
    return {"space": DEMO.to_dict(), "search": "cracks", "prior_runs": ["a-0", "a-1"], "pages": True} | parts


def blocks(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [block for block in spec["blocks"] if block["type"] == kind]


@pytest.mark.slow
def test_a_search_gets_its_sweep_and_its_pages(server) -> None:
    answer = wandb_pages.register(request(data="/data/cracks", source="/spaces/demo.yaml"))
    assert answer == {
        "sweep": {
            "id": "sweep0", "url": f"{server.url}/me/segdec-tuner/sweeps/sweep0", "entity": "me",
            "project": "segdec-tuner",
        },
        "workspace": answer["workspace"],
        "report": f"{server.url}/me/segdec-tuner/reports/Search-cracks--Vmlldzo2",
        "problems": [],
    }  # fmt: skip
    (sweep,) = server.sweeps["sweep0"]["mutations"]
    assert (sweep["entityName"], sweep["projectName"]) == ("me", "segdec-tuner")
    assert yaml.safe_load(sweep["config"]) == sweep_config(
        DEMO, "/data/cracks", source="/spaces/demo.yaml", name="cracks"
    )
    assert json.loads(sweep["priorRunsFilters"]) == {"$or": [{"name": "a-0"}, {"name": "a-1"}]}
    workspace, report = server.views
    assert (workspace["displayName"], workspace["type"]) == ("cracks", "project-view")
    view = workspace["name"].removeprefix("nw-").removesuffix("-v")
    assert answer["workspace"] == f"{server.url}/me/segdec-tuner?nw={view}"
    spec = json.loads(workspace["spec"])["section"]
    assert [one["value"] for one in spec["runSets"][0]["filters"]["filters"]] == ["cracks", "trial"]
    assert (report["displayName"], report["type"]) == ("Search cracks", "runs")
    spec = json.loads(report["spec"])
    assert "dice_positive_mean" in blocks(spec, "markdown-block")[0]["content"]
    for grid in blocks(spec, "panel-grid"):
        (runs,) = grid["metadata"]["runSets"]
        assert runs["project"]["name"] == "segdec-tuner"
        assert [one["value"] for one in runs["filters"]["filters"]] == ["cracks", "trial"]
    panels = [
        panel["viewType"]
        for grid in blocks(spec, "panel-grid")
        for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]
    ]
    assert {"Parallel Coordinates Plot", "Parameter Importance", "Scatter Plot", "Run Comparer"} < set(panels)
    assert server.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}


@pytest.mark.slow
def test_nothing_is_made_twice_and_further_runs_are_attached(server) -> None:
    first = wandb_pages.register(request(project="surfaces", entity="team"))
    server.asked.clear()
    assert wandb_pages.register(request(**first)) == first
    assert server.asked == ["Viewer", "SweepWithRuns"]
    config = server.sweeps["sweep0"]["config"]
    wider = replace(DEMO, objective=Objective(metric="f1"))
    again = wandb_pages.register(request(**first, prior_runs=["a-0", "a-1", "a-2"]) | {"space": wider.to_dict()})
    assert again == first
    made, attached = server.sweeps["sweep0"]["mutations"]
    assert (made["id"], attached["id"]) == (None, "node-sweep0")
    assert (attached["entityName"], attached["projectName"]) == ("team", "surfaces")
    assert attached["config"] == config
    assert json.loads(attached["priorRunsFilters"])["$or"] == [{"name": f"a-{n}"} for n in range(3)]
    assert len(server.views) == 2


@pytest.mark.slow
def test_a_password_in_the_base_url_is_in_no_address_and_in_no_problem(server, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url.replace("://", "://someone:s3cret@"))
    answer = wandb_pages.register(request())
    assert answer["sweep"]["url"] == f"{server.url}/me/segdec-tuner/sweeps/sweep0"
    assert answer["report"].startswith(f"{server.url}/me/")
    assert "s3cret" not in json.dumps(answer)
    known = {page: url.replace("://", "://someone:s3cret@") for page, url in answer.items() if isinstance(url, str)}
    again = wandb_pages.register(request(**known, sweep=answer["sweep"]))  # kept by an earlier version
    assert again == answer


@pytest.mark.slow
def test_a_sweep_may_be_named_by_its_id_alone_and_may_be_all_that_is_wanted(server) -> None:
    config = sweep_config(DEMO, "synthetic", project="surfaces")
    first = wandb_pages.register({"config": config, "project": "surfaces"})
    assert first == NOTHING | {
        "sweep": {
            "id": "sweep0", "url": f"{server.url}/me/surfaces/sweeps/sweep0", "entity": "me", "project": "surfaces"
        },
        "problems": [],
    }  # fmt: skip
    assert wandb_pages.register({"sweep": "sweep0", "project": "surfaces"}) == first
    assert len(server.sweeps["sweep0"]["mutations"]) == 1
    assert server.views == []


@pytest.mark.slow
def test_a_sweep_that_is_gone_is_a_problem_and_is_not_made_again(server) -> None:
    known = {"id": "gone" * 200, "url": "http://there/gone", "entity": "me", "project": "segdec-tuner"}
    answer = wandb_pages.register(request(sweep=known, pages=False))
    assert answer["sweep"] == known
    (problem,) = answer["problems"]
    assert problem.startswith("sweep: Sweep me/segdec-tuner/gonegone")
    assert len(problem) == 500
    assert server.sweeps == {}


@pytest.mark.slow
def test_a_space_that_searches_nothing_has_pages_without_a_sweep(server) -> None:
    server.projects.add("segdec-tuner")
    answer = wandb_pages.register(request(space=space_file.load("results_page").to_dict()))
    assert answer["sweep"] is None
    assert [problem.partition(",")[0] for problem in answer["problems"]] == [
        "sweep: a W&B sweep needs a parameter to draw"
    ]
    assert answer["workspace"]
    assert answer["report"]


@pytest.mark.slow
def test_what_wandb_warns_of_is_said(server) -> None:
    server.warnings = ["min is above max"]
    answer = wandb_pages.register(request(pages=False))
    assert answer["sweep"]["id"] == "sweep0"
    assert answer["problems"] == ["sweep: W&B takes it, but says min is above max"]


@pytest.mark.slow
def test_without_the_package_the_pages_are_a_problem_that_says_how_to_install_it(server, tmp_path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['wandb_workspaces'] = None")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(offline.ROOT)]))
    answer = wandb_pages.register(request())
    assert answer["sweep"]["id"] == "sweep0"
    assert (answer["workspace"], answer["report"]) == (None, None)
    (problem,) = answer["problems"]
    assert "pip install 'segdec-tuner[wandb-pages]'" in problem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "where", "begins"),
    [
        (401, "viewer", "log in: Failed to verify credentials"),
        (500, "viewer", "log in: Failed to verify credentials"),
        (0, "viewer", "log in: Failed to verify credentials"),
        (403, "upsertSweep", "sweep: "),
        (500, "upsertSweep", "sweep: "),
        (0, "upsertSweep", "sweep: "),
    ],
)
def test_a_server_that_refuses_fails_or_hangs_up(server, status, where, begins) -> None:
    server.status = lambda path, body: status if where.encode() in body else 200
    answer = wandb_pages.register(request(pages=False))
    assert answer | {"problems": []} == NOTHING | {"problems": []}
    (problem,) = answer["problems"]
    assert problem.startswith(begins)
    assert len(problem) <= 500
    assert "Traceback" not in problem
    assert KEY not in problem


@pytest.mark.slow
def test_one_page_that_fails_leaves_the_other(server) -> None:
    server.status = lambda path, body: 500 if b"UpsertView2" in body else 200
    answer = wandb_pages.register(request())
    assert answer["workspace"] is None
    assert answer["report"]
    (problem,) = answer["problems"]
    assert problem.startswith("workspace: ")


@pytest.mark.slow
def test_what_was_made_before_a_server_hung_is_known(server, monkeypatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def hang(path: str, body: bytes) -> int:
        if b"UpsertView2" in body:
            hanging.set()
            go_on.wait(offline.DEADLINE_S)
            return 0
        return 200

    server.status = hang
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "60")
    try:
        answer = wandb_pages.register(request(), timeout_s=10.0)
    finally:
        go_on.set()
    assert hanging.is_set()
    assert answer["sweep"]["id"] == "sweep0"
    assert (answer["workspace"], answer["report"]) == (None, None)
    assert answer["problems"] == ["W&B did not answer within 10 s"]


@pytest.mark.slow
def test_a_hanging_server_leaves_no_process_behind_and_the_key_is_no_argument(server, monkeypatch) -> None:
    asked, go_on = threading.Event(), threading.Event()
    family: list[int] = []
    arguments: list[str] = []

    def hang(path: str, body: bytes) -> int:
        if path == "/graphql" and not asked.is_set():
            for child in offline.children(os.getpid()):
                if "tuner.tracking.wandb_pages" in Path(f"/proc/{child}/cmdline").read_text():
                    family.extend([child, *offline.children(child)])
            arguments.extend(Path(f"/proc/{pid}/cmdline").read_text() for pid in family)
            asked.set()
            go_on.wait(offline.DEADLINE_S)
        return 0

    server.status = hang
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "60")
    try:
        answer = wandb_pages.register(request(), timeout_s=10.0)
    finally:
        go_on.set()
    assert answer == NOTHING | {"problems": ["W&B did not answer within 10 s"]}
    assert len(family) >= 2  # with wandb-core
    offline.until(lambda: all(map(offline.gone, family)), "the end of the processes")
    assert not any(KEY in line for line in arguments)


def run(stdin: str) -> subprocess.CompletedProcess[str]:
    variables = wandb_pages._RETRIES | dict(os.environ)
    return subprocess.run(PROGRAM, input=stdin, capture_output=True, text=True, env=variables, timeout=60)


@pytest.mark.slow
def test_the_process_says_answers_alone_and_its_exit_code_says_whether_all_is_there(server, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    result = run(json.dumps(request(pages=False)))
    assert result.returncode == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["sweep"] is not None for line in lines] == [False, True]
    server.status = lambda path, body: 500
    result = run(json.dumps(request(pages=False)))
    assert result.returncode == 1
    assert [json.loads(line)["sweep"] for line in result.stdout.splitlines()] == [None]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_process_that_breaks_is_one_problem(server, monkeypatch, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['yaml'] = None")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(offline.ROOT)]))
    answer = wandb_pages.register(request())
    (problem,) = answer["problems"]
    assert problem.startswith("the process that asks W&B ended with exit code 1: ModuleNotFoundError: ")


def test_the_caller_imports_no_wandb() -> None:
    code = "import sys, tuner.tracking.wandb_pages; print(*({'wandb', 'ray', 'torch', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def printed(capsys, *arguments: str) -> str:
    assert cli.main(["wandb-sweep", *arguments]) == 0
    return capsys.readouterr().out


def test_the_verb_prints_what_wandb_sweep_reads(tmp_path, monkeypatch, capsys) -> None:
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(DEMO.to_dict()))
    Path("sweep.yaml").write_text(printed(capsys, "mine.yaml", "--data", "set"))
    assert utils.load_sweep_config("sweep.yaml") == sweep_config(
        DEMO, str(tmp_path / "set"), source=str(tmp_path / "mine.yaml"), project="segdec-tuner", run_cap=7
    )
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert yaml.safe_load(printed(capsys, "demo"))["project"] == "theirs"
    other = yaml.safe_load(printed(capsys, "demo", "--data", "synthetic", "--project", "mine"))
    assert (other["project"], other["command"][2:5]) == ("mine", ["demo", "--data", "synthetic"])


@pytest.mark.slow
def test_wandb_sweep_takes_what_the_verb_prints(server, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(printed(capsys, "demo"))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.chdir(tmp_path)
    subprocess.run([str(offline.WANDB), "sweep", str(file)], check=True, capture_output=True, timeout=60)
    (sweep,) = server.sweeps["sweep0"]["mutations"]
    assert sweep["projectName"] == "segdec-tuner"
    assert yaml.safe_load(sweep["config"]) == yaml.safe_load(file.read_text())


@pytest.mark.slow
def test_wandb_agent_calls_tuner_trial_with_what_was_drawn(server, tmp_path, monkeypatch, capsys) -> None:
    """With wandb's own agent; the program is a stand-in that keeps its arguments."""
    printed(capsys, "demo", "--data", "synthetic", "--register")
    stand_in = tmp_path / "bin" / "tuner"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done > {tmp_path}/arguments\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.chdir(tmp_path)
    server.drawn = [{"learning_rate": 0.75, "threshold_rule": "grid", "num_segmented": None}]
    agent = [str(offline.WANDB), "agent", "me/segdec-tuner/sweep0"]
    subprocess.run(agent, check=True, capture_output=True, timeout=80)
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "trial", "demo", "--data", "synthetic", "--set",
        "learning_rate=0.75", "threshold_rule=grid", "num_segmented=None",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_verb_registers(server, capsys) -> None:
    url = f"{server.url}/me/mine/sweeps/sweep0"
    assert printed(capsys, "demo", "--register", "--project", "mine").splitlines() == [
        "sweep sweep0", url, "wandb agent me/mine/sweep0",
    ]  # fmt: skip
    (sweep,) = server.sweeps["sweep0"]["mutations"]
    assert yaml.safe_load(sweep["config"])["run_cap"] == 7
    assert sweep["priorRunsFilters"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("status", "said"), [(401, "log in: "), (500, "log in: "), (0, "log in: ")])
def test_the_verb_says_what_went_wrong_in_one_message(server, capsys, status, said) -> None:
    server.status = lambda path, body: status
    assert cli.main(["wandb-sweep", "demo", "--data", "synthetic", "--register"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"tuner wandb-sweep: {said}")
    assert captured.err.count("\n") == 1


def test_the_verb_without_an_account(capsys, monkeypatch) -> None:
    assert cli.main(["wandb-sweep", "demo", "--data", "synthetic", "--register"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("tuner wandb-sweep: a sweep on the server needs a W&B API key, found none; run")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["results_page"], "needs a parameter to draw"),
        (["no_such"], "there is no such file"),
        (["demo", "--data", ""], "the data must be a folder"),
    ],
)
def test_the_verb_refuses(arguments, said, capsys) -> None:
    assert cli.main(["wandb-sweep", *arguments]) == 2
    assert said in capsys.readouterr().err
