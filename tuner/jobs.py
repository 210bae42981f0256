"""The same command as a job on a Ray cluster: what is submitted from a laptop, and how it is followed from there.

The driver runs on the cluster's head, where the project is installed; it reaches the cluster by `--address auto`. What
lies in the current folder travels, and nothing of the environment: keys and tokens must be on the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from tuner.datasets import SYNTHETIC
from tuner.records import SearchFailed
from tuner.space_file import load, shipped

_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_START = 60.0

_MOST_MB = 100
"""of the current folder; Ray keeps what travels in the head's memory, and takes no more"""

_STAYS = {"runs", "wandb", "dist", "__pycache__", "node_modules", "venv"}
"""folders that never travel, nor does what begins with a dot: .git, .venv, caches, .env with its secrets"""

_ON_HEAD = ("runs", "warm_start")
"""options that name folders on the head: the job's own is removed after it, so these lie in the home directory"""

_SECONDS_TO_STOP = "60"
"""so long a search may take to end when the job is stopped"""


def search(space: str, data: str, chosen: Mapping[str, Any], console: Console) -> int:
    """Submits `tuner search` to the cluster at `chosen["address"]` and follows it; the exit code of the command there.

    ValueError for what can be known here to go wrong.
    """
    load(space)  # its problems are told before anything travels
    _check_data(data)
    _check_study(chosen["study"])
    if chosen["storage"] is None:
        console.print(
            f"no --storage: results will lie in ~/{chosen['runs']} on the cluster's head, and go with it; before, for "
            f"example `ray rsync-down cluster.yaml '~/{chosen['runs']}/' {chosen['runs']}/` brings them here",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    elif "://" not in chosen["storage"]:
        _check_absolute("--storage", chosen["storage"])
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "folder.zip"
        travels_as = _pack(Path.cwd(), None if space in shipped() and not Path(space).exists() else space, package)
        words = ["tuner", "search", travels_as or space, "--data", data, *_options(chosen)]
        return _run(str(chosen["address"]), words, package, console)


def resume(run: str, data: str | None, address: str, runs: str, console: Console) -> int:
    """The same for `tuner resume` of a run on the cluster: a folder on the head, or its address at the storage."""
    if data is not None:
        _check_data(data)
    words = ["tuner", "resume", run if "://" in run else _on_head(run), "--runs", _on_head(runs)]
    return _run(address, [*words, *(["--data", data] if data is not None else [])], None, console)


def _options(chosen: Mapping[str, Any]) -> list[str]:
    """The options as words; those that were not given are left to the cluster, but for the folders there."""
    words = []
    for name, value in (dict(chosen) | {"address": "auto"}).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, _on_head(str(value)) if name in _ON_HEAD else str(value)]
    return words


def _on_head(folder: str) -> str:
    return folder if folder.startswith(("/", "~")) else f"~/{folder}"


def _quoted(word: str) -> str:
    """A word for the shell of the head, whose home directory ~ is."""
    return f'"$HOME"/{shlex.quote(word[2:])}' if word.startswith("~/") else shlex.quote(word)


def _check_data(data: str) -> None:
    if data != SYNTHETIC:
        _check_absolute("--data", data)


def _check_absolute(option: str, value: str) -> None:
    """ValueError for a folder of this machine. Whether an absolute one is there can only the nodes know."""
    if "://" not in value and not value.startswith("/"):
        raise ValueError(
            f"{option} must be where all nodes of the cluster find it: an absolute path there, or an address such as "
            f"s3://BUCKET/FOLDER; found {value}, which lies on this machine"
        )


def _check_study(study: str | None) -> None:
    if study is not None and re.match(r"sqlite(\+\w+)?:///(?!/)", study):
        raise ValueError(
            f"the file of --study must have an absolute path on the cluster's head, found {study}; a fourth / begins it"
        )


# What travels


def _pack(folder: Path, space: str | None, package: Path) -> str | None:
    """Zips what travels of a folder, and a space's file wherever it lies; what that is called there."""
    files = {str(file.relative_to(folder)): file for file in _files(folder)}
    travels_as = None
    if space is not None:
        found = Path(space).resolve()
        is_inside = found.is_relative_to(folder) and str(found.relative_to(folder)) in files
        travels_as = str(found.relative_to(folder)) if is_inside else f"space-of-this-search/{found.name}"
        files[travels_as] = found
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if sum(sizes.values()) > _MOST_MB * 1e6:
        by_part = Counter[str]()
        for name, size in sizes.items():
            by_part[name.partition("/")[0]] += size
        (largest, most), *_ = by_part.most_common(1)
        raise ValueError(
            f"the current folder travels to the cluster and must hold at most {_MOST_MB} MB, found "
            f"{sum(sizes.values()) / 1e6:,.0f} MB in {folder}, of which {most / 1e6:,.0f} MB in {largest}; name "
            "that in .gitignore if the search does not need it, or start from another folder"
        )
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, file in sorted(files.items()):
            archive.write(file, name)
    return travels_as


def _files(folder: Path) -> Iterator[Path]:
    """What travels of a folder: what git would take, or all where there is no git; never what _STAYS names."""
    listed = subprocess.run(  # noqa: S603
        ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],  # noqa: S607
        capture_output=True, text=True, check=False,
    ) if shutil.which("git") else None  # fmt: skip
    if listed and listed.returncode == 0:
        found: Iterator[Path] = (folder / name for name in listed.stdout.split("\0") if name)
    else:
        found = _below(folder)
    for file in found:
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part in _STAYS or part.startswith(".") for part in parts):
            yield file


def _below(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _STAYS and not name.startswith(".")]
        yield from (Path(here) / name for name in files)


# Submitting and following


def _run(address: str, words: list[str], package: Path | None, console: Console) -> int:
    """Submits a command and follows it to its end; its exit code."""
    client = _client(address)
    entrypoint = " ".join(map(_quoted, words))
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _SECONDS_TO_STOP}}
    if package is not None:
        environment["working_dir"] = str(package)
    job = _submit(client, entrypoint, environment)
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    follow = f"{token}ray job logs --follow {job} --address {address}"
    stop = f"{token}ray job stop {job} --address {address}"
    console.print(f"job {job} runs on the cluster: {entrypoint}", markup=False, highlight=False, soft_wrap=True)
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; follow it: {follow}\n  stop it: {stop}", file=sys.stderr)
        return 130
    details = client.get_job_info(job)
    if details.status == JobStatus.STOPPED:
        print("the job was stopped; `tuner resume RUN --address URL` goes on", file=sys.stderr)
        return 130
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code:
        return int(details.driver_exit_code)
    raise SearchFailed(f"the job ended without an exit code ({details.message}); its output: {follow}")


def _submit(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any]) -> str:
    """The id of the job. A head that has just started may have nobody to run it yet."""
    give_up = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > give_up:
                raise
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Prints what a job prints until it has ended, over any number of connections."""
    shown = 0
    while True:
        passed = 0
        try:
            async for text in client.tail_job_logs(job):  # from its beginning each time
                print(text[max(0, shown - passed) :], end="", flush=True)
                passed += len(text)
                shown = max(shown, passed)
        except (OSError, RuntimeError):  # the connection was cut
            await asyncio.sleep(1)
        if client.get_job_status(job).is_terminal():
            return


def _client(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at an address. ValueError where there is none, or it will not have
    us."""
    try:  # Ray's client would wait for ever
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_SECONDS_TO_ANSWER).close()  # noqa: S310
    except urllib.error.HTTPError:  # an answer
        pass
    except (OSError, HTTPException, ValueError) as error:
        raise _no_dashboard(address, error) from error
    for name in ("", ".dashboard.modules.dashboard_sdk", ".dashboard.modules.job.sdk"):  # what it does is told here
        logging.getLogger(f"ray{name}").setLevel(logging.ERROR)
    # Ray would use the user's token where RAY_AUTH_MODE says so alone.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        with _without_ray_address():
            client = JobSubmissionClient(address)
        version = client._server_ray_version  # get_version() tells that of the API
    except AuthenticationError as error:
        raise ValueError(
            f"the cluster at {address} asks for its token, and has none from here or another one; put the head's "
            "~/.ray/auth_token into the same file here"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # ConnectionError is an OSError
        raise _no_dashboard(address, error) from error
    if version != ray.__version__:
        raise ValueError(
            f"the cluster at {address} must run the Ray of this machine, {ray.__version__}, found {version}; install "
            "the same wheel with constraints.txt on both"
        )
    return client


@contextmanager
def _without_ray_address() -> Iterator[None]:
    """Ray takes these before the address that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _no_dashboard(address: str, error: Exception) -> ValueError:
    return ValueError(
        f"--address must be that of a Ray cluster's dashboard, found none at {address} ({type(error).__name__}: "
        f"{error}); `ray dashboard cluster.yaml` brings it to http://127.0.0.1:8265, and Ray's other ports are none"
    )
