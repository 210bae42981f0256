"""Trials side by side on one GPU in one process, the host: each in a thread of its own, on a CUDA stream of its own.

Processes that share a GPU take turns on it; streams of one process fill it together, and share one CUDA context. Each
trial trains as it does alone, whatever its configuration: nothing of it is merged with that of another.

The trial's own process, which has the trial's place in the cluster, asks the host on its node (`train_at`) and passes
on what it hears. The two hold a connection: where one of them dies, the other is told by the operating system.
"""

from __future__ import annotations

import os
import secrets
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, TypeVar

import torch

from model.config import RunConfig
from model.parallel import Traceback, portable
from model.step import own_stream
from tuner import gpu
from tuner.records import NodeUnfit
from tuner.scratch import scratch_within
from tuner.trial import Task
from tuner.use import Meter

Found = TypeVar("Found")

_LOOPBACK = "127.0.0.1"
_CALLERS = 128
"""so many may call a host at the same moment"""


class HostLost(Exception):
    """The process that trained a trial has died, or cannot be reached."""


@dataclass(frozen=True)
class Address:
    """Where a host of this node is reached, and by whom alone."""

    port: int
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Asked:
    """A trial as a host is told of it."""

    config: RunConfig
    share: float
    """of the GPU"""
    threads: int
    """CPU threads"""
    resume: Path | None
    """the checkpoint folder that it goes on from, on this node"""
    scratch: Path
    """a folder of the trial's own process, which may still read there when the host has died"""


Heard = Callable[[dict[str, Any], Path | None, dict[str, float]], None]
"""Takes a trial's report and what its host used since the last, all trials of the host together: see tuner/use.py."""


def train_at(address: Address, asked: Asked, heard: Heard) -> None:
    """Has a trial trained by a host of this node. The host waits until `heard` has returned, and gives the trial up
    where that raises. Raises what the trial raises; HostLost if the host dies."""
    try:
        connection = Client((_LOOPBACK, address.port), authkey=address.key)
    except (OSError, EOFError, AuthenticationError) as error:
        raise HostLost(f"the process that trains the trials of this GPU cannot be reached ({error})") from error
    with connection:
        _tell(connection, asked)
        while True:
            kind, value = _hear(connection)
            if kind == "done":
                return
            if kind == "failed":
                failure, trace = value
                raise failure from Traceback(trace)
            heard(*value)
            _tell(connection, None)


def _tell(connection: Connection, value: Any) -> None:
    try:
        connection.send(value)
    except OSError as error:
        raise _lost(error) from error


def _hear(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _lost(error) from error


def _lost(error: Exception) -> HostLost:
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return HostLost(f"the process that trained the trials of this GPU died ({said}); memory may have run out")


class Host:
    """Trains the trials of a search that share a device, for as long as this process lives."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        self._together = gpu.Together(device)
        key = secrets.token_bytes(32)
        self._listener = Listener((_LOOPBACK, 0), backlog=_CALLERS)
        _, port = self._listener.address
        self.address = Address(int(port), key)
        threading.Thread(target=self._accept, name="host", daemon=True).start()

    def _accept(self) -> None:
        while True:
            with suppress(OSError):  # of one who went away
                connection = self._listener.accept()
                threading.Thread(target=self._serve, args=[connection], name="trial", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, suppress(OSError, EOFError, AuthenticationError):  # who has gone, or does not know the key
            deliver_challenge(connection, self.address.key)  # in this thread: one who says nothing holds up nobody
            answer_challenge(connection, self.address.key)
            asked = connection.recv()
            if (answer := self._answer(asked, connection)) is not None:
                connection.send(answer)

    def _answer(self, asked: Asked, connection: Connection) -> tuple[str, Any] | None:
        """How a trial ended, when its memory is free again; None if nobody wants to know."""
        try:
            with self._together.share(asked.share):
                return self._trained(asked, connection)
        except NodeUnfit as error:
            return "failed", (error, traceback.format_exc())
        except RuntimeError as error:  # of CUDA, before the trial began or after its end
            self._end_if_broken()
            return "failed", (NodeUnfit(str(error)), traceback.format_exc())

    def _trained(self, asked: Asked, connection: Connection) -> tuple[str, Any] | None:
        """Runs a trial to its end; an exception is the end of this trial alone."""

        def report(progress: dict[str, Any], folder: Path | None) -> None:
            try:
                connection.send(("said", (progress, folder, meter.read())))
                connection.recv()
            except (OSError, EOFError):
                raise _Gone from None

        try:
            with Meter(self._device) as meter, scratch_within(asked.scratch):
                run = partial(self._task.run, asked.config, self._device, asked.resume, report)
                _apart(run, self._device, asked.threads)
        except _Gone:
            return None
        except Exception as error:
            self._end_if_broken()
            return "failed", (portable(error), traceback.format_exc())
        return "done", None

    def _end_if_broken(self) -> None:
        """Ends this process where it could train nothing any more, before its trials say that they have failed: they
        go on from their checkpoints."""
        if not gpu.still_answers(self._device):
            os._exit(1)


class _Gone(BaseException):
    """The process of a trial has gone, or was told to stop it. No error that a trial may take for its own."""


def side_by_side(functions: Sequence[Callable[[], Found]], device: torch.device, threads: int = 1) -> list[Found]:
    """Calls functions in this process, each in a thread of its own on a stream of its own, with so many CPU threads
    each; what they return. Raises what the first of them raises, when all have ended."""
    with ThreadPoolExecutor(len(functions)) as pool:
        running = [pool.submit(_apart, function, device, threads) for function in functions]
    return [function.result() for function in running]


def _apart(function: Callable[[], Found], device: torch.device, threads: int) -> Found:
    torch.set_num_threads(threads)  # of this thread, and of those that begin after it: all have as many
    with own_stream(device):
        return function()
