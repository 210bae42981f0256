"""A search that is submitted as a job: what travels, what is refused before anything does, which address is none."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import threading
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import ray
from aiohttp import ClientConnectionError, ServerDisconnectedError
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus
from rich.console import Console

from tuner import jobs
from tuner.records import SearchFailed

CHOSEN = {"name": None, "runs": "runs", "trials": 3, "no_report": True, "tensorboard": False, "warm_start": None,
          "study": None, "storage": None, "address": "http://127.0.0.1:1", "wandb": "online"}  # fmt: skip


def packed(folder: Path, space: str | None = None) -> tuple[set[str], str | None]:
    travels_as = jobs._pack(folder, space, package := folder.parent / "package.zip")
    with zipfile.ZipFile(package) as archive:
        return set(archive.namelist()), travels_as


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize("git", [True, False])
def test_the_current_folder_travels_without_runs_caches_and_secrets(tmp_path: Path, git: bool) -> None:
    folder = tmp_path / "here"
    fill(folder, "a.yaml", "deep/b.py", "runs/demo/run.json", ".venv/bin/python", ".env", "deep/__pycache__/b.pyc")
    fill(folder, "wandb/run", "big/images.npy", "deep/dist/old.whl")
    if git:
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        (folder / ".gitignore").write_text("/big/\n")
    assert packed(folder)[0] == {"a.yaml", "deep/b.py"} | (set() if git else {"big/images.npy"})


def test_a_space_travels_wherever_it_lies(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "here"
    fill(folder, "spaces/inside.yaml", "runs/left-out.yaml")
    fill(tmp_path, "elsewhere/outside.yaml")
    monkeypatch.chdir(folder)
    assert packed(folder, "spaces/inside.yaml") == ({"spaces/inside.yaml"}, "spaces/inside.yaml")
    for outside in ("../elsewhere/outside.yaml", "runs/left-out.yaml"):
        travels_as = f"space-of-this-search/{Path(outside).name}"
        assert packed(folder, outside) == ({"spaces/inside.yaml", travels_as}, travels_as)


def test_a_folder_that_is_too_large_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    fill(folder, "small.py", "images/one.npy")
    os.truncate(folder / "images" / "one.npy", 130_000_000)
    with pytest.raises(
        ValueError, match=r"at most 100 MB, found 130 MB in .*here, of which 130 MB in images; name that"
    ):
        packed(folder)


def test_the_command_there_is_the_same_but_for_its_folders() -> None:
    words = jobs._options(CHOSEN | {"warm_start": "/mnt/runs/other", "name": "it's"})
    assert words == ["--name=it's", "--runs=~/runs", "--trials=3", "--no-report", "--warm-start=/mnt/runs/other",
                     "--address=auto", "--wandb=online"]  # fmt: skip
    line = " ".join(map(jobs._quoted, words))
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [word.replace("~", os.environ["HOME"]) for word in words]


@pytest.mark.parametrize(
    ("data", "chosen", "message"),
    [
        (
            "data/cracks",
            {},
            "--data must be where all nodes of the cluster find it.*; found data/cracks, which lies on",
        ),
        ("synthetic", {"storage": "runs"}, "--storage must be where all nodes of the cluster find it"),
        ("synthetic", {"study": "sqlite:///study.db"}, "--study must have an absolute path on the cluster's head"),
        ("synthetic", {"runs": "~somebody/runs"}, "must be absolute, or lie in the home directory there, found ~some"),
        ("synthetic", {}, "found none at http://127.0.0.1:1 "),
        ("synthetic", {"runs": "~"}, "found none at http://127.0.0.1:1 "),
        ("s3://bucket/cracks", {"study": "sqlite:////mnt/study.db"}, "found none at http://127.0.0.1:1 "),
    ],
)
def test_what_lies_on_the_laptop_alone_is_refused(
    data: str, chosen: dict[str, Any], message: str, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        jobs.search("demo", data, CHOSEN | chosen, Console(stderr=True))


@pytest.mark.parametrize(("runs", "where"), [("runs", "~/runs"), ("/mnt/runs/", "/mnt/runs"), ("~", "~")])
def test_without_a_storage_it_says_where_results_will_lie(runs: str, where: str, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="found none at"):
        jobs.search("demo", "synthetic", CHOSEN | {"runs": runs}, Console(stderr=True))
    assert f"results will lie in {where} on the cluster's head" in capsys.readouterr().err


SECRETS = {
    "data": "s3://KEY:hush/hush@bucket/cracks",
    "study": "postgresql://me:hush@host/study",
    "storage": "s3://bucket/runs?access_key=hush",
}


@pytest.mark.parametrize("option", SECRETS)
def test_a_secret_is_refused_before_anybody_is_asked(option: str, monkeypatch, tmp_path) -> None:
    """A job's command can be read by all who see the cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_client", lambda address: pytest.fail("asked"))
    given = {"data": "synthetic"} | {option: SECRETS[option]}
    data = given.pop("data")
    with pytest.raises(ValueError, match=r"must hold no (secret|password)") as caught:
        jobs.search("demo", data, CHOSEN | given, Console(stderr=True))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("run", "data"), [(SECRETS["storage"], None), (SECRETS["data"], None), ("runs/demo", SECRETS["data"])]
)
def test_a_run_is_gone_on_with_without_secrets(run: str, data: str | None, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_client", lambda address: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"must hold no (secret|password)") as caught:
        jobs.resume(run, data, "http://127.0.0.1:1", "runs", Console(stderr=True))
    assert "hush" not in str(caught.value)


class Cluster:
    """Takes a job that is over at once, and keeps what was submitted."""

    def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        self.entrypoint = entrypoint
        with zipfile.ZipFile(runtime_env["working_dir"]) as archive:
            self.files = set(archive.namelist())
        return "job"

    def get_job_info(self, job: str) -> JobDetails:
        return JobDetails(type=JobType.SUBMISSION, entrypoint="", status=JobStatus.SUCCEEDED)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "done\n"


def test_a_run_goes_on_with_the_code_of_here_and_on_the_cluster_that_it_is_sent_to(monkeypatch, tmp_path) -> None:
    fill(tmp_path, "mine.py")
    monkeypatch.chdir(tmp_path)
    cluster = Cluster()
    monkeypatch.setattr(jobs, "_client", lambda address: cluster)
    told = Console(stderr=True)
    assert jobs.resume("s3://b/runs/one", "/data", "http://127.0.0.1:1", "runs", told) == 0
    assert cluster.files == {"mine.py"}
    assert cluster.entrypoint == ('tuner resume --runs="$HOME"/runs --data=/data --address=auto -- s3://b/runs/one')
    assert jobs.finals("runs/one", None, None, True, "http://127.0.0.1:1", told) == 0
    assert cluster.entrypoint == 'tuner finals --open-test --address=auto -- "$HOME"/runs/one'


class Cut(Cluster):
    """Its connections are cut, but for one of several."""

    asked = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "first line\n"
        raise ServerDisconnectedError

    def get_job_info(self, job: str) -> JobDetails:
        self.asked += 1
        if self.asked < 3:
            raise ConnectionError
        return super().get_job_info(job)


class Gone(Cut):
    """A cluster that takes a job and is never seen again."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        raise ServerDisconnectedError
        yield

    def get_job_info(self, job: str) -> JobDetails:
        raise ClientConnectionError


@pytest.mark.parametrize("cluster", [Cut(), Gone()])
def test_a_job_is_followed_over_connections_that_are_cut(cluster: Cut, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_client", lambda address: cluster)
    monkeypatch.setattr(jobs, "_SECONDS_BETWEEN_TRIES", 0.01)
    monkeypatch.setattr(jobs, "_SECONDS_CUT_OFF", 0.1)
    if isinstance(cluster, Gone):
        with pytest.raises(SearchFailed, match=r"job job goes on if .*follow the job: .*ray job logs --follow job "):
            jobs.resume("runs/one", None, "http://127.0.0.1:1", "runs", Console(stderr=True))
    else:
        assert jobs.resume("runs/one", None, "http://127.0.0.1:1", "runs", Console(stderr=True)) == 0
        assert capsys.readouterr().out == "first line\n"


class Answers(http.server.BaseHTTPRequestHandler):
    """What a server says that is no dashboard, or one that will not have us."""

    status, body = 200, b"<html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "dashboard, found none at http://127.0.0.1:"),
        (404, b"", "dashboard, found none at http://127.0.0.1:"),
        (500, b"", "dashboard, found none at http://127.0.0.1:"),
        (401, b"", "asks for its token, .*put the head's ~/.ray/auth_token into the same file here"),
        (403, b"", "asks for its token"),
        (200, b'{"ray_version": "2.49.0"}', rf"must run the Ray of this machine, {ray.__version__}, found 2.49.0"),
    ],
)
def test_an_address_that_is_none_is_told_so(status: int, body: bytes, message: str, monkeypatch) -> None:
    kind = type("Kind", (Answers,), {"status": status, "body": body})
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # is not asked instead
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match=message):
            jobs._client(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(jobs, "_SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="dashboard, found none at"):
        jobs._client(f"http://127.0.0.1:{silent.getsockname()[1]}")
