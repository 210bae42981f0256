"""A search that is submitted as a job: what travels, what is refused before anything does, which address is none."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from tuner import jobs

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
    assert words == ["--name", "it's", "--runs", "~/runs", "--trials", "3", "--no-report", "--warm-start",
                     "/mnt/runs/other", "--address", "auto", "--wandb", "online"]  # fmt: skip
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
        ("synthetic", {}, "found none at http://127.0.0.1:1 "),
        ("s3://bucket/cracks", {"study": "sqlite:////mnt/study.db"}, "found none at http://127.0.0.1:1 "),
    ],
)
def test_what_lies_on_the_laptop_alone_is_refused(
    data: str, chosen: dict[str, Any], message: str, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        jobs.search("demo", data, CHOSEN | chosen, Console(stderr=True))


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
