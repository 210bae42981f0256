"""Several devices that train one network: a process each, which takes its rows of every batch and adds its gradients to
those of the others, so that each step is that of one process with the whole batch, within rounding.

The process that asks for it trains nothing: it starts the others, hears what the first of them says, and ends them all
when one is done or has failed, or when it ends itself, however it ends. So no way of failing can hang it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from model.arrays import Array

Item = TypeVar("Item")

_LONGEST_WAIT = timedelta(days=30)
"""of a process for the others, which judge or write meanwhile; that one died is seen without it"""

_SECONDS_FOR_THE_CAUSE = 10.0
"""A process that lost another says so, perhaps before the other's end is seen."""


class PeerLost(RuntimeError):
    """Another process of the team has gone."""


@dataclass(frozen=True)
class Team:
    """The processes that train one network, and which of them this one is."""

    rank: int = 0
    ranks: int = 1

    def own(self, rows: Array) -> Array:
        """The rows of a batch that this process takes; there may be none."""
        return rows[self.rank :: self.ranks]

    def meet(self) -> None:
        """Returns when all processes have come so far: what one does next cannot spoil what another is still at."""
        if self.ranks > 1:
            _together(distributed.barrier)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values if self.ranks == 1 else _sum_in_place(values.clone())

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Gives all processes the sum of their gradients; one that had no rows adds nothing."""
        if self.ranks == 1:
            return
        parameters = list(parameters)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = _sum_in_place(torch.cat([part.flatten() for part in parts]))
        for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))  # in its order in memory

    def in_turn(self, of_steps: Sequence[Sequence[Item]]) -> Iterator[Item]:
        """What all processes noted of their rows, step by step, in the order that the rows have in the batches."""
        everyones: list[Any] = [of_steps]
        if self.ranks > 1:
            everyones = [None] * self.ranks
            _together(lambda: distributed.all_gather_object(everyones, of_steps))
        nothing = object()
        for step in zip(*everyones, strict=True):
            for turn in itertools.zip_longest(*step, fillvalue=nothing):
                yield from (item for item in turn if item is not nothing)


ALONE = Team()


def _sum_in_place(values: Tensor) -> Tensor:
    _together(lambda: distributed.all_reduce(values))
    return values


def _together(call: Callable[[], object]) -> None:
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo and NCCL have no type of their own for it
        raise PeerLost(f"another process of the team has gone ({error})") from error


def run(
    function: Callable[..., None],
    devices: Sequence[torch.device],
    arguments: Sequence[Any],
    heard: Callable[[Any], None],
) -> None:
    """Calls `function(team, device, say, *arguments)` in a process for each device, until the first is done.

    What the first says comes to `heard`, and it goes on when that returns; what the others say goes nowhere. Raises
    what any of them raises; RuntimeError if one dies.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // len(devices))
    members: list[tuple[BaseProcess, Connection]] = []
    with tempfile.TemporaryDirectory(prefix="segdec-team-") as folder:
        try:
            for rank in range(len(devices)):
                ours, theirs = context.Pipe()
                task = (rank, list(devices), f"file://{folder}/meeting", threads, theirs, function, tuple(arguments))
                process: BaseProcess = context.Process(target=_member, args=task, name=f"team-{rank}", daemon=True)
                members.append((process, ours))
                process.start()
                theirs.close()  # so that the end of the process is the end of the pipe
            _listen(members, devices, heard)
        finally:
            for process, _ in members:
                if process.pid is not None:
                    process.kill()
                    process.join()
            for _, pipe in members:
                pipe.close()


def _listen(
    members: Sequence[tuple[BaseProcess, Connection]], devices: Sequence[torch.device], heard: Callable[[Any], None]
) -> None:
    """Until the first member is done. Raises what one of them fails with, the cause before what follows from it."""
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(members)}
    lost: Exception | None = None
    end = 0.0
    while True:
        ready = wait(list(pipes), None if lost is None else max(0.0, end - time.monotonic()))
        if not ready and lost is not None:
            raise lost
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                process = members[rank][0]
                process.join(_SECONDS_FOR_THE_CAUSE)
                raise RuntimeError(
                    f"the process of device {rank} ({devices[rank]}) that trains with others died "
                    f"({_how_it_ended(process.exitcode)}); memory may have run out"
                ) from None
            if kind == "said":
                heard(value)
                pipe.send(None)
            elif kind == "done" and rank == 0:
                return
            elif kind == "done":
                del pipes[pipe]
            else:
                error, trace = value
                error.__cause__ = Traceback(trace)
                if not isinstance(error, PeerLost):
                    raise error
                lost, end = error, time.monotonic() + _SECONDS_FOR_THE_CAUSE
                del pipes[pipe]


class Traceback(Exception):
    """What was raised in another process, as text, where a traceback shows the cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _member(
    rank: int,
    devices: list[torch.device],
    meeting: str,
    threads: int,
    pipe: Connection,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What a process of the team does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal reaches all; who started us ends us

    def say(value: Any) -> None:
        if rank == 0:
            pipe.send(("said", value))
            pipe.recv()

    try:
        torch.set_num_threads(threads)
        _join(rank, devices, meeting)
        function(Team(rank, len(devices)), devices[rank], say, *arguments)
        pipe.send(("done", None))
    except Exception as error:
        pipe.send(("failed", (portable(error), traceback.format_exc())))
    pipe.close()
    os._exit(0)  # at once: leaving the group in order would wait for the others


def _join(rank: int, devices: list[torch.device], meeting: str) -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}  # nothing listens outside
    on_cuda = devices[rank].type == "cuda"
    if on_cuda:
        torch.cuda.set_device(devices[rank])
    backend = "nccl" if on_cuda and len(set(devices)) == len(devices) else "gloo"  # NCCL wants a GPU a process
    distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=len(devices), timeout=_LONGEST_WAIT
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The same error as another process gets it, without what its traceback holds; or one that says the same where it
    cannot be sent."""
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301  (our own)
        assert isinstance(again, Exception)
        return again
    except Exception:
        kind = MemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
        return kind(f"{type(error).__name__}: {error}")
