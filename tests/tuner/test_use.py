"""What a process uses, against the clocks and the memory of this one."""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tuner.use import Meter, Sampler

CPU = torch.device("cpu")
MIB = 2**20


def work(seconds: float) -> None:
    """Takes so much time on a core, however long that is."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))


def in_a_thread(seconds: float) -> None:
    thread = threading.Thread(target=work, args=[seconds])
    thread.start()
    thread.join()


def cores(meter: Meter, work: Callable[[], None]) -> tuple[float, float, float]:
    """The cores in use while something works, between the least and the most that they can be by these clocks."""
    meter.read()
    wall, cpu = time.monotonic(), time.process_time()
    before = time.monotonic()
    work()
    passed, used = time.monotonic() - before, time.process_time() - cpu
    found = meter.read()["cpu_percent"] / 100
    # A thread of an earlier test, such as Ray's, takes a little too.
    return used / (time.monotonic() - wall + 0.01), found, (time.process_time() - cpu + 0.01) / passed


@pytest.mark.parametrize("how", [work, in_a_thread])
def test_time_on_cores_is_that_of_all_threads_since_the_last_reading(how) -> None:
    meter = Meter(CPU)
    for seconds in (0.3, 0.1):
        least, found, most = cores(meter, lambda seconds=seconds: how(seconds))
        assert 0 < least <= found <= most <= (os.cpu_count() or 1) * 1.2


def test_the_first_reading_is_since_the_start() -> None:
    before = time.process_time()
    meter = Meter(CPU)
    made = time.monotonic()
    work(0.1)
    found = meter.read()["cpu_percent"]
    assert found <= 100 * (time.process_time() - before) / 0.1
    assert found * (time.monotonic() - made + 0.01) >= 10


def test_memory_is_what_a_process_has_alone(tmp_path: Path) -> None:
    meter = Meter(CPU)
    size = 64 * MIB
    (tmp_path / "cache").write_bytes(b"\0" * size)
    with (tmp_path / "cache").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = meter.read()["memory_mib"]
        assert mapped[:: mmap.PAGESIZE] == b"\0" * (size // mmap.PAGESIZE)  # every page is resident
        assert abs(meter.read()["memory_mib"] - before) < 8
        tensor = torch.ones(size, dtype=torch.uint8)
        after = meter.read()["memory_mib"]
        assert 60 < after - before < 72
        del tensor
        assert abs(meter.read()["memory_mib"] - before) < 8


def test_what_cannot_be_read_is_left_out() -> None:
    """A GPU that is not here, or not in use yet."""
    with Meter(torch.device("cuda")) as meter:
        assert set(meter.read()) == {"cpu_percent", "memory_mib"}
    json.dumps(meter.read(), allow_nan=False)


def taken(values: list[float | None]) -> tuple[Sampler, threading.Event]:
    """A sampler that takes these one after another and then fails, and when it has."""
    left, done = iter(values), threading.Event()

    def sample() -> float | None:
        try:
            return next(left)
        except StopIteration:
            done.set()
            raise

    return Sampler(sample, 0.001), done


def test_samples_are_averaged_until_there_are_none() -> None:
    sampler, done = taken([None, 10.0, 20.0, None, 60.0])
    assert done.wait(10)
    sampler._thread.join(10)
    assert not sampler._thread.is_alive()
    assert sampler.mean() == 30.0
    assert sampler.mean() is None


def test_a_sampler_that_is_stopped_takes_no_more() -> None:
    with Meter(torch.device("cuda")) as meter:
        sampler = meter._busy
        assert sampler._thread.is_alive()
        assert sampler._thread.daemon
    sampler._thread.join(10)
    assert not sampler._thread.is_alive()
