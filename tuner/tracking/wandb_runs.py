"""Weights & Biases: every trial a run, written by one logger process for the whole search.

The driver imports no wandb and never waits for it: it puts lines of JSON into a queue that a thread writes to the
process's standard input (`tuner.tracking.wandb_process`), which takes them in at once.

The process is a plain subprocess and not one of `multiprocessing`, whose spawned children import the main module
again: a user's script without a main guard would start its search a second time.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tuner.tracking.base import RunInfo, Tracker
from tuner.tracking.wandb_files import LOG, logged, report_run

logger = logging.getLogger(__name__)

WAIT_S = 5.0
"""How long the end of a search waits for the logger process, unless it is asked to wait longer."""

MOST_WAITING = 64
"""While more lines than these wait in the driver, it leaves previews out: a process that does not read, and a megabyte
an epoch, would fill the driver's memory. Figures are always kept."""

LOGIN_LIMIT_S = 60.0
"""How long the look for credentials may take: it asks no server, but has to import wandb."""

LOGIN_MISSING = 3
"""Exit code of the process that looks for credentials and finds none."""

_NOT_PASSED_ON = (
    "WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH",
    "WANDB_SERVICE", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_DIR", "WANDB_TAGS", "WANDB_NOTES",
)  # fmt: skip
"""Belong to a run or a service of the user's own process, and would bend all of ours."""


class WandbTracker(Tracker):
    """Logs trials to `RUN/wandb` (offline, needs no account) or to a W&B server (online)."""

    name = "W&B"

    def __init__(self, mode: Literal["offline", "online"], wait_s: float = WAIT_S) -> None:
        self._mode = mode
        self._wait_s = wait_s
        self._run: RunInfo | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: threading.Thread | None = None
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._log = Path()
        self._log_read = 0
        """bytes of the log that were told"""
        self._logs = "trials are"
        self._previews_left_out = 0

    @property
    def pid(self) -> int | None:
        """Of the logger process; None before the search has started."""
        return self._process.pid if self._process else None

    @property
    def way_back(self) -> str:
        if self._run is None:
            return ""
        sync = sync_command(self._run.directory.resolve())
        if self._run.shared:
            return f"the trial's record will be whole, its W&B run is not; `{sync}` uploads what there is"
        return f"nothing is lost for good: `{sync}` completes W&B from the records and uploads it"

    def search_started(self, run: RunInfo) -> None:
        directory = run.directory.resolve()
        self._log = directory / LOG
        self._run = run
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_read = log.tell()
            with contextlib.suppress(BlockingIOError):  # `tuner sync` has it, whose list of folders is made
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._process = subprocess.Popen(  # noqa: S603
                _command(str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=directory,  # wandb reads wandb/settings of the current folder, which may be of anything
                env=environment(self._mode, directory),
                start_new_session=True,  # a Ctrl-C at the terminal goes to the driver alone
            )
        self._writer = threading.Thread(target=self._write, name="wandb-writer", daemon=True)
        self._writer.start()
        self._send(
            {
                "name": run.name,
                "id": run.id,
                "directory": str(directory),
                "mode": self._mode,
                "objective_mode": run.mode,
                "space": run.space,
                "data": run.data,
                "sweep": run.sweep,
                "wandb_run": run.wandb_run,
                "shared": run.shared,
            }
        )

    def trial_started(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        assert self._run is not None
        self._send(
            {
                "event": "trial_started",
                "trial": trial,
                "config": {**config, **params},
                "baseline": self._run.is_baseline(config),
                "history": history,
            }
        )

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        if previews and self._queue.qsize() > MOST_WAITING:
            self._previews_left_out += len(previews)
            previews = {}
        pictures = {name: base64.b64encode(png).decode("ascii") for name, png in previews.items()}
        self._send({"event": "epoch_ended", "trial": trial, "figures": figures, "use": use, "previews": pictures})

    def trial_ended(self, record: dict[str, Any]) -> None:
        self._send({"event": "trial_ended", "record": record})

    def trial_held(self, record: dict[str, Any]) -> None:
        self._send({"event": "trial_held", "trial": record["trial"]})

    def report_written(self) -> None:
        self._logs = "the report is"
        self._send({"event": "report"})

    def search_ended(self, state: str) -> None:
        """Closes the pipe, at which the process finishes all runs, and waits for it a moment. What it has not done then
        it does alone."""
        if self._process is None or self._writer is None:
            return
        if self._previews_left_out:
            logger.warning(
                "W&B: the logger process could not keep up: %d previews were left out", self._previews_left_out
            )
        deadline = time.monotonic() + self._wait_s
        self.close()
        self._writer.join(self._wait_s)
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._tell_log()
            logger.warning(
                "W&B: %s still being written or uploaded, which goes on in the background for ten minutes at most; "
                "`%s` then brings what is missing", self._logs, sync_command(self._log.parents[1]),
            )  # fmt: skip
            return
        if code != 0:
            raise RuntimeError(self._death(code))
        self._tell_log()

    def close(self) -> None:
        """Ends the pipe; the process finishes its runs and exits by itself."""
        self._queue.put(None)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._writer is None:
            raise RuntimeError("the search has not started")
        code = self._process.poll()
        if code is not None or not self._writer.is_alive():
            raise RuntimeError(self._death(code))
        self._tell_log()
        self._queue.put(json.dumps(message, default=_plain).encode() + b"\n")

    def _write(self) -> None:
        """The writer thread: the only place that may wait for the logger process."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                for line in iter(self._queue.get, None):
                    pipe.write(line)
                    pipe.flush()
        except OSError as error:  # the process has gone; the next event finds and reports it
            logger.debug("the pipe to the W&B logger process broke: %s", error)

    def _death(self, code: int | None) -> str:
        lines = self._new_lines()
        why = lines[-1] if lines else "it left no message"
        return f"the W&B logger process (pid {self.pid}) ended with exit code {code}: {why}"

    def _tell_log(self) -> None:
        """Warns of what the process has said since the last time; it says nothing when all is well."""
        if self._log.stat().st_size > self._log_read and (lines := self._new_lines()):
            more = f" ({len(lines)} lines in {self._log})" if len(lines) > 1 else ""
            logger.warning("W&B: %s%s", lines[-1], more)

    def _new_lines(self) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(self._log_read)
            said = log.read().rpartition(b"\n")[0] + b"\n"  # the last line may be half written
        self._log_read += len(said) if said.strip() else 0
        return [line for line in without_password(said.decode(errors="replace")).splitlines() if line.strip()]


def report_is_logged(run: RunInfo) -> bool:
    """Whether W&B has the run of the report, or the files to upload it from."""
    return any(part.exit_code == 0 for part in logged(run.directory, report_run(run.id)))


def check_online() -> None:
    """Raises ValueError unless a search can log online, as far as can be said without the network."""
    check_login(
        "--wandb online",
        "run `wandb login`, set WANDB_API_KEY, or take --wandb offline and upload later with `tuner sync RUN`",
    )


def check_login(wanted_by: str, way_out: str) -> None:
    """Raises ValueError unless wandb finds credentials: an API key or an identity token, by wandb's own rules.

    Needs no network, so a key that the server would refuse passes.
    """
    _check_base_url()
    try:
        with tempfile.TemporaryDirectory(prefix="tuner-wandb-") as scratch:
            result = subprocess.run(  # noqa: S603
                _command("--check-login"),
                cwd=scratch,
                env=environment("online"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LOGIN_LIMIT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"wandb has not said within {LOGIN_LIMIT_S:g} s whether there is an API key; the machine, or the folder "
            "that wandb is installed in, is very slow: try again, or search with --wandb offline"
        ) from None
    if result.returncode == 0:
        return
    if result.returncode != LOGIN_MISSING:
        why = [line for line in without_password(result.stderr).splitlines() if line.strip()][-1:]
        raise RuntimeError(f"wandb could not look for an API key: {''.join(why) or 'it left no message'}")
    raise ValueError(f"{wanted_by} needs a W&B API key, found {result.stdout.strip() or 'none'}; {way_out}")


def _check_base_url() -> None:
    url = os.environ.get("WANDB_BASE_URL")
    if not url:
        return
    try:
        parts = urlsplit(url)
        holds = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:  # of a port or an address in brackets
        holds = False
    if not holds:
        raise ValueError(
            "WANDB_BASE_URL must be the URL of a W&B server, http://HOST or https://HOST, found "
            f"{without_password(url)!r}; set it right, or unset it for W&B's own server"
        )


def _command(argument: str) -> list[str]:
    # -P: nothing in the current folder may shadow a module of the logger process.
    return [sys.executable, "-P", "-m", "tuner.tracking.wandb_process", argument]


def environment(mode: str, directory: Path | None = None) -> dict[str, str]:
    """Variables of a process that runs wandb for us; what it keeps of artifacts lies with the run in `directory`."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment["WANDB_SILENT"] = "true"
    if path := environment.get("PYTHONPATH"):  # the process has another current folder than we
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    if directory:
        environment["WANDB_DATA_DIR"] = environment["WANDB_CACHE_DIR"] = str(directory / "wandb" / "data")
    if mode == "offline":
        # What is not there cannot leak, and an offline search calls nobody, not even with a crash report.
        environment.pop("WANDB_API_KEY", None)
        environment["WANDB_ERROR_REPORTING"] = "false"
    return environment


def sync_command(directory: Path) -> str:
    """What uploads the runs in a directory, as a shell takes it."""
    return f"tuner sync {shlex.quote(str(directory))}"


def without_password(text: str) -> str:
    """A text whose URLs have lost user and password: WANDB_BASE_URL may hold them, and messages are handed around."""
    return re.sub(r"://[^/\s?#]*@", "://", text)


def _plain(value: object) -> object:
    """JSON for what callers pass by accident: numpy's scalars become numbers, the rest text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
