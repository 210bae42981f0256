"""The logger process: writes the W&B runs of all trials, fed with one JSON object a line on its standard input.

It takes in at once all that it is sent, so that a driver which ends need not wait for a server, and ends when its input
has ended and is worked off, at the latest LEFT_ALONE_S later. The end of its input is also how it learns that the
driver has died; it finishes the runs that are open then as interrupted. Signals do not end it: a Ctrl-C or a node's
SIGTERM reaches the driver too, whose last events must still be written.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuner.tracking.wandb_files import LOCK
from tuner.tracking.wandb_log import Runs
from tuner.tracking.wandb_runs import LOGIN_MISSING, without_password

LEFT_ALONE_S = 600.0
"""So long the process may go on after its input has ended."""
PARENT_CHECK_S = 1.0
PREVIEW_BACKLOG = 256
"""While so many events wait, previews are left out: figures are small and must not be lost, pictures are neither."""
_LONGEST_REASON = 300


def read_events(descriptor: int, parent: int) -> Iterator[dict[str, Any]]:
    """Events until the pipe ends or the parent is gone. A line cut off by the parent's death is dropped.

    The parent is watched too because a child that it forked may hold the pipe open.
    """
    rest = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], PARENT_CHECK_S)
        if not ready:
            if os.getppid() != parent:
                return
            continue
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(json.loads, lines)


class Inbox:
    """The events that wait: a thread takes them in, however long the work on one of them lasts."""

    def __init__(self, events: Iterator[dict[str, Any]]) -> None:
        self._events = events
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.previews_left_out = 0
        threading.Thread(target=self._take_in, daemon=True).start()

    def _take_in(self) -> None:
        try:
            for event in self._events:
                if event.get("previews") and self._queue.qsize() >= PREVIEW_BACKLOG:
                    self.previews_left_out += len(event["previews"])
                    event["previews"] = {}
                self._queue.put(event)
        finally:
            self._queue.put(None)
            limit = threading.Timer(LEFT_ALONE_S, os._exit, [1])
            limit.daemon = True
            limit.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (event := self._queue.get()) is not None:
            yield event


def serve(parent: int) -> None:
    """Applies every event of the search; the first one describes the search itself."""
    descriptor = os.dup(0)  # not inherited, so that wandb-core does not hold the pipe open as its own input
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    inbox = Inbox(read_events(descriptor, parent))
    events = iter(inbox)
    search = next(events, None)
    if search is None:
        return
    with (Path(search["directory"]) / LOCK).open("w") as lock:
        if not search["shared"]:
            # The process of an earlier session may still have work: what it will have written must not come twice.
            fcntl.flock(lock, fcntl.LOCK_EX)
        runs = Runs(search)
        try:
            for event in events:
                getattr(runs, event.pop("event"))(**event)
        finally:
            runs.close()
            if inbox.previews_left_out:
                print(f"could not keep up: {inbox.previews_left_out} previews were left out", flush=True)


def check_login() -> int:
    """Whether wandb finds credentials, by its own rules and without asking the network or the user."""
    import wandb

    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        print(error)
        return LOGIN_MISSING
    return 0 if found else LOGIN_MISSING


def main(arguments: list[str]) -> int:
    """`PARENT_PID` serves a search; `--check-login` looks for credentials."""
    try:
        if arguments == ["--check-login"]:
            return check_login()
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        serve(int(arguments[0]))
    except Exception as error:
        # The last line is what the driver tells, and that of a traceback may be the end of a long message.
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        said = f"{traceback.format_exc()}{type(error).__name__}: {reason}"
        print(without_password(said), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
