"""Weights & Biases: every trial a run, written by one logger process for the whole search.

The driver imports no wandb and never waits for it: it puts lines of JSON into a queue that a thread writes to the
process's standard input. The queue takes everything but previews, which are left out while it holds PREVIEW_BACKLOG
events or more: figures are small and must not be lost, pictures are neither.

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
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from tuner.tracking import wandb_process
from tuner.tracking.base import RunInfo, Tracker

logger = logging.getLogger(__name__)

PREVIEW_BACKLOG = 256
FINISH_WAIT_S = {"offline": 30.0, "online": 120.0}
"""How long the end of a search waits for the logger process before ending it. Offline a run takes milliseconds."""

LOG = Path("wandb") / "tracker.log"
"""In a run's directory: what the logger process says. It holds a shared lock on it as long as it lives."""

_NOT_PASSED_ON = (
    "WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_SWEEP_ID", "WANDB_SERVICE",
)  # fmt: skip
"""Belong to a run or a service of the user's own process, and would bend all of ours."""


class WandbTracker(Tracker):
    """Logs trials to `RUN/wandb` (offline, needs no account) or to a W&B server (online)."""

    def __init__(self, mode: Literal["offline", "online"], finish_wait_s: float | None = None) -> None:
        self._mode = mode
        self._finish_wait_s = FINISH_WAIT_S[mode] if finish_wait_s is None else finish_wait_s
        self._run: RunInfo | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: threading.Thread | None = None
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._log = Path()
        self._log_start = 0
        self._previews_left_out = 0

    @property
    def pid(self) -> int | None:
        """Of the logger process; None before the search has started."""
        return self._process.pid if self._process else None

    def search_started(self, run: RunInfo) -> None:
        directory = run.directory.resolve()
        self._run = run
        self._log = directory / LOG
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            with contextlib.suppress(BlockingIOError):  # `tuner sync` has it, whose list of folders is made
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._process = subprocess.Popen(  # noqa: S603
                _command(str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment(self._mode),
                start_new_session=True,  # a Ctrl-C at the terminal goes to the driver alone
            )
        self._writer = threading.Thread(target=self._write, name="wandb-writer", daemon=True)
        self._writer.start()
        self._send(
            {
                "name": run.name,
                "directory": str(directory),
                "mode": self._mode,
                "objective_mode": run.mode,
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
                "resumed_epoch": len(history),
            }
        )

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        if previews and self._queue.qsize() >= PREVIEW_BACKLOG:
            self._previews_left_out += len(previews)
            previews = {}
        pictures = {name: base64.b64encode(png).decode("ascii") for name, png in previews.items()}
        self._send({"event": "epoch_ended", "trial": trial, "figures": figures, "previews": pictures})

    def trial_ended(self, record: dict[str, Any]) -> None:
        self._send({"event": "trial_ended", "record": record})

    def trial_held(self, record: dict[str, Any]) -> None:
        self._send({"event": "trial_held", "trial": record["trial"]})

    def search_ended(self, state: str) -> None:
        """Closes the pipe, at which the process finishes all runs, and waits for it no longer than FINISH_WAIT_S."""
        if self._process is None or self._writer is None:
            return
        deadline = time.monotonic() + self._finish_wait_s
        self.close()
        self._writer.join(self._finish_wait_s)
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()  # it ignores SIGTERM
            self._process.wait()
            raise RuntimeError(
                f"the W&B logger process did not finish within {self._finish_wait_s:g} s after the search had "
                f"{state} and was ended; what it wrote lies in {self._log.parent}: `{self._way_to_upload()}` uploads it"
            ) from None
        if code != 0:
            raise RuntimeError(self._death(code))
        self._report_log()

    def close(self) -> None:
        """Ends the pipe; the process finishes its runs and exits by itself."""
        self._queue.put(None)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._writer is None:
            raise RuntimeError("the search has not started")
        code = self._process.poll()
        if code is not None or not self._writer.is_alive():
            raise RuntimeError(self._death(code))
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
        lines = self._log_lines()
        why = lines[-1] if lines else "it left no message"
        return (
            f"the W&B logger process (pid {self.pid}) ended with exit code {code}: {why}; "
            f"what it wrote until then lies in {self._log.parent}"
        )

    def _way_to_upload(self) -> str:
        """Online folders are wandb's to finish: nothing in them says what is missing."""
        if self._mode == "offline":
            return f"tuner sync {self._log.parents[1]}"
        return f"wandb sync --include-online {self._log.parent}"

    def _report_log(self) -> None:
        if lines := self._log_lines():
            logger.warning("W&B: %s (%d lines in %s)", lines[-1], len(lines), self._log)
        if self._previews_left_out:
            logger.warning("W&B could not keep up: %d previews were left out", self._previews_left_out)

    def _log_lines(self) -> list[str]:
        """What the process has said; nothing, when all is well."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]


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
    result = subprocess.run(  # noqa: S603
        _command("--check-login"),
        env=environment("online"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if result.returncode == 0:
        return
    if result.returncode != wandb_process.LOGIN_MISSING:
        raise RuntimeError(f"wandb could not look for an API key: {result.stderr.strip()[-500:]}")
    raise ValueError(f"{wanted_by} needs a W&B API key, found {result.stdout.strip() or 'none'}; {way_out}")


def _command(argument: str) -> list[str]:
    # -P: neither the current folder nor this one may shadow a module of the logger process.
    return [sys.executable, "-P", str(Path(wandb_process.__file__).resolve()), argument]


def environment(mode: str) -> dict[str, str]:
    """Variables of a process that runs wandb for us."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment["WANDB_SILENT"] = "true"
    if mode == "offline":
        # What is not there cannot leak, and an offline search calls nobody, not even with a crash report.
        environment.pop("WANDB_API_KEY", None)
        environment["WANDB_ERROR_REPORTING"] = "false"
    return environment


def _plain(value: object) -> object:
    """JSON for what callers pass by accident: numpy's scalars become numbers, the rest text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
