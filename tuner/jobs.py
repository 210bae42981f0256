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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from tuner.datasets import SYNTHETIC, is_address, problem_of_address
from tuner.options import Options, problem_of_storage
from tuner.records import SearchFailed
from tuner.space_file import load, shipped

_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_START = 60.0
_SECONDS_BETWEEN_TRIES = 1.0
_SECONDS_CUT_OFF = 300.0
"""so long a job is followed while nobody answers"""

_MOST_MB = 100
"""of the current folder; Ray keeps what travels in the head's memory, and takes no more"""

_STAYS = {"runs", "wandb", "dist", "__pycache__", "node_modules", "venv"}
"""folders that never travel, nor does what begins with a dot: .git, .venv, caches, .env with its secrets"""

_ON_HEAD = ("runs", "warm_start")
"""options that name folders on the head: the job's own is removed after it, so these lie in the home directory"""

_NO_OPTIONS = ("name", "runs")
"""of a search's command line; the others have rules"""

_SECONDS_TO_STOP = "60"
"""so long a search may take to end when the job is stopped"""


def search(space: str, data: str, chosen: Mapping[str, Any], console: Console) -> int:
    """Submits `tuner search` to the cluster at `chosen["address"]` and follows it; the exit code of the command there.

    ValueError for what can be known here to go wrong.
    """
    load(space)  # its problems are told before anything travels; a job's command is shown to all who see the cluster
    Options(**{name: value for name, value in chosen.items() if name not in _NO_OPTIONS} | {"address": "auto"})
    _check_data(data)
    _check_study(chosen["study"])
    if chosen["storage"] is None:
        there = _on_head(str(chosen["runs"])).rstrip("/")
        console.print(
            f"no --storage: results will lie in {there} on the cluster's head, and go with it; before, for example "
            f"`ray rsync-down cluster.yaml '{there}/' runs/` brings them here",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    elif "://" not in chosen["storage"]:
        _check_absolute("--storage", chosen["storage"])
    return _run(
        str(chosen["address"]),
        lambda travels_as: ["tuner", "search", *_options({"data": data, **chosen}), "--", travels_as or space],
        None if space in shipped() and not Path(space).exists() else space,
        console,
    )


def resume(run: str, data: str | None, address: str, runs: str, console: Console) -> int:
    """The same for `tuner resume` of a run on the cluster: a folder on the head, or its address at the storage."""
    if "://" in run and (problem := problem_of_storage(run)):
        raise ValueError(problem)
    return _on_run("resume", run, {"runs": runs, "data": data}, address, console)


def finals(run: str, data: str | None, seeds: int | None, open_test: bool, address: str, console: Console) -> int:
    """The same for `tuner finals` of a run in a folder on the head."""
    if "://" in run:
        raise ValueError(
            "finals need the run's folder on the cluster's head, found an address; `tuner resume` brings it"
        )
    return _on_run("finals", run, {"data": data, "seeds": seeds, "open_test": open_test}, address, console)


def _on_run(verb: str, run: str, chosen: Mapping[str, Any], address: str, console: Console) -> int:
    if chosen["data"] is not None:
        _check_data(str(chosen["data"]))
    words = ["tuner", verb, *_options(chosen), "--", run if "://" in run else _on_head(run)]
    return _run(address, lambda _: words, None, console)


def _options(chosen: Mapping[str, Any]) -> list[str]:
    """The options as words; those that were not given are left to the cluster, but for the folders there."""
    words = []
    for name, value in (dict(chosen) | {"address": "auto"}).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:  # joined, for a value may begin with a hyphen
            words.append(f"{option}={_on_head(str(value)) if name in _ON_HEAD else value}")
    return words


def _on_head(folder: str) -> str:
    """A folder there, whose ~ is left to the shell of the head. ValueError for the home of somebody else."""
    folder = f"{folder}/" if folder == "~" else folder
    if folder.startswith("~") and not folder.startswith("~/"):
        raise ValueError(
            f"a folder on the cluster's head must be absolute, or lie in the home directory there, found {folder}; "
            "write it in full, or as ~/FOLDER"
        )
    return folder if folder.startswith(("/", "~")) else f"~/{folder}"


def _quoted(word: str) -> str:
    """A word for the shell of the head, whose home directory ~ is."""
    option, separator, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if not value.startswith("~/"):
        return shlex.quote(word)
    return f'{option}{separator}"$HOME"/{shlex.quote(value[2:])}'


def _check_data(data: str) -> None:
    if is_address(data) and (problem := problem_of_address(data)):
        raise ValueError(problem)
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


def _run(address: str, words: Callable[[str | None], list[str]], space: str | None, console: Console) -> int:
    """Submits a command with the current folder, so that all of a run is done by one code, and follows it to its end;
    its exit code. `words`: the command, of what the space's file is called there."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "folder.zip"
        entrypoint = " ".join(map(_quoted, words(_pack(Path.cwd(), space, package))))
        client = _client(address)
        environment = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _SECONDS_TO_STOP},
            "working_dir": str(package),
        }
        job = _submit(client, entrypoint, environment)
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    follow = f"{token}ray job logs --follow {job} --address {address}"
    stop = f"{token}ray job stop {job} --address {address}"
    console.print(f"job {job} runs on the cluster: {entrypoint}", markup=False, highlight=False, soft_wrap=True)
    try:
        details = asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; follow it: {follow}\n  stop it: {stop}", file=sys.stderr)
        return 130
    if details is None:
        raise SearchFailed(
            f"the cluster at {address} has not answered for {_SECONDS_CUT_OFF / 60:g} minutes, and job {job} goes on "
            f"if it is there; see that the address leads to it again (`ray dashboard`); follow the job: {follow}\n  "
            f"stop it: {stop}"
        )
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


async def _follow(client: JobSubmissionClient, job: str) -> JobDetails | None:
    """Prints what a job prints until it has ended, over any number of connections; how it ended, or None when nobody
    has answered for minutes."""
    from aiohttp import ClientError  # Ray's client has it, of the extra `cluster`

    cut = (OSError, RuntimeError, ClientError)  # or the answer is none
    shown, answered = 0, time.monotonic()
    while True:
        passed = 0
        with suppress(*cut):
            async for text in client.tail_job_logs(job):  # from its beginning each time
                answered = time.monotonic()
                print(text[max(0, shown - passed) :], end="", flush=True)
                passed += len(text)
                shown = max(shown, passed)
        with suppress(*cut):
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            answered = time.monotonic()
        if time.monotonic() - answered > _SECONDS_CUT_OFF:
            return None
        await asyncio.sleep(_SECONDS_BETWEEN_TRIES)


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
