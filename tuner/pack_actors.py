"""The hosts of a search (tuner/pack.py) as Ray actors: one a GPU that trials share, made when one first asks for it.

An actor ends with the process that has made it. The processes of trials come and go; so one actor makes all hosts, and
the driver makes that one: hosts end with the search, however it ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from tuner import pack
from tuner.nodes import only_on
from tuner.pack import Address
from tuner.records import NodeUnfit
from tuner.trial import Task

DEVICE = torch.device("cuda", 0)
"""what hosts train on, of what they see"""

_VISIBLE = "CUDA_VISIBLE_DEVICES"
"""where Ray tells a process which GPU it holds"""

_TRIES = 3
"""The host that is known may be a dead one; then so many less one may die as they start."""

_SECONDS_BETWEEN_TRIES = 1.0


@dataclass(frozen=True)
class Hosts:
    """What a trial needs to find its host."""

    maker: Any
    task: Any
    """a reference to it"""
    device: torch.device

    def address(self) -> Address:
        """Where the host is reached of the GPU that this process holds a part of. NodeUnfit if none can be started."""
        node = ray.get_runtime_context().get_node_id()
        try:
            visible = os.environ.get(_VISIBLE, "")
            found: Address = ray.get(self.maker.address.remote(node, visible, [self.task], self.device))
        except RayTaskError as error:  # its text is a traceback
            raise error.cause from error
        return found


@contextmanager
def opened(task: Task) -> Iterator[Hosts]:
    """The hosts of a search, which end with this."""
    here = ray.get_runtime_context().get_node_id()
    made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Maker)
    maker = made.options(scheduling_strategy=only_on(here)).remote()
    try:
        yield Hosts(maker, ray.put(task), DEVICE)
    finally:
        ray.kill(maker)


class _Maker:
    """Makes the hosts, and keeps them alive."""

    def __init__(self) -> None:
        self._hosts: dict[tuple[str, str], Any] = {}

    async def address(self, node: str, visible: str, task: list[Any], device: torch.device) -> Address:
        """That of the host of a GPU: of a new one, where there is none or it has died."""
        place = node, visible
        made = ray.remote(num_cpus=0)(_Host)  # the trials hold what it uses
        died: Exception | None = None
        tries = 0
        while tries < _TRIES:
            if place not in self._hosts:
                options = made.options(scheduling_strategy=only_on(node))
                self._hosts[place] = options.remote(task[0], visible, device)
            host = self._hosts[place]
            try:
                found: Address = await host.address.remote()
                return found
            except ActorUnavailableError:  # not known yet whether it is dead
                await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
            except RayError as error:
                died, tries = error, tries + 1
                if self._hosts.get(place) is host:  # else another trial has found the same
                    del self._hosts[place]
        said = str(died).strip().splitlines()[-1]  # the rest is a traceback
        raise NodeUnfit(f"the process that is to train the trials of GPU {visible} dies as it starts: {said}")


class _Host:
    """A host in a process of its own."""

    def __init__(self, task: Task, visible: str, device: torch.device) -> None:
        os.environ[_VISIBLE] = visible  # before CUDA looks for it
        self._host = pack.Host(task, device)

    def address(self) -> Address:
        return self._host.address
