"""Trials an hour on one device: so many side by side as processes with a share of it each, and packed as one.

    python -m bench.side_by_side [--counts 1 2 4 8 16] [--width-factors 1 0.25] [--seconds 5] [--device cpu]

A trial is the training of the results page, 50 epochs of 7,908 images at batch 1, of which some seconds are measured
with all processes at work; starting them and validations are not in it. Times one are the ratio to one process.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure import Table, config_of, options_of, split_of
from bench.plain import images_in
from bench.schedule import EPOCHS, IMAGES
from bench.training_step import Fast, fitting
from model.config import RunConfig
from model.data import Cache, open_cache
from model.sample import Sample
from tuner.trial import take_device

HOW = "processes", "packed"

_SECONDS_TO_START = 180


class Work(NamedTuple):
    """What each process gets."""

    config: RunConfig
    samples: list[Sample]
    root: Path
    """of the cache"""
    gpus: float
    """its share of the device; 0 is the CPU"""
    threads: int
    seconds: float


def trial(work: Work, ready: Any, go: Any, stop: Any, answers: Any) -> None:
    """Trains until it is told to stop; answers with images a second over the epochs that ended before."""
    device = take_device(work.gpus, work.threads)
    cache = open_cache(work.samples, work.config.input_height, work.config.input_width, work.root)
    fast = Fast(work.config, device)
    split = fitting(fast, cache, device, work.seconds / 4)  # the others warm up meanwhile too
    fast.epoch(split)
    ready.release()
    go.wait()
    began = last = time.perf_counter()
    done = 0
    while not done or not stop.is_set():
        fast.epoch(split)
        if not done or not stop.is_set():
            done, last = done + images_in(split, work.config), time.perf_counter()
    answers.put(done / (last - began))


def processes(work: Work, count: int) -> float:
    """Images a second of so many processes together. RuntimeError if one of them fails."""
    spawn = multiprocessing.get_context("spawn")
    ready, go, stop, answers = spawn.Semaphore(0), spawn.Event(), spawn.Event(), spawn.Queue()
    started = [spawn.Process(target=trial, args=(work, ready, go, stop, answers), daemon=True) for _ in range(count)]
    try:
        for process in started:
            process.start()
        _wait(lambda: ready.acquire(timeout=0.5), started)
        go.set()
        time.sleep(work.seconds)
        stop.set()
        rates: list[float] = []

        def answered() -> bool:
            with suppress(queue.Empty):
                rates.append(answers.get(timeout=0.5))
                return True
            return False

        _wait(answered, started)
        for process in started:
            process.join()
        return sum(rates)
    finally:
        for process in started:
            if process.pid:
                process.kill()
                process.join()


def _wait(happened: Any, started: list[Any]) -> None:
    """Until something has happened once for each process."""
    end = time.monotonic() + _SECONDS_TO_START
    for _ in started:
        while not happened():
            if failed := [process.exitcode for process in started if process.exitcode]:
                raise RuntimeError(f"{len(failed)} of {len(started)} processes failed, exit code {failed[0]}")
            if time.monotonic() > end:
                raise RuntimeError(f"not all of {len(started)} processes answered within {_SECONDS_TO_START} s")


packed: Callable[[Work, int], float] | None = None
"""Images a second of so many trials of `Work.config` that are trained as one, those of all trials counted; called in a
process of its own, with the whole device. None while there is nothing that does it."""


def packed_rate(work: Work, count: int) -> float | None:
    """What `packed` finds in a new process."""
    if packed is None:
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(packed, work, count).result()


def compare(options: argparse.Namespace, cache: Cache, width: float) -> bool:
    """Prints a table for a network's width; whether any processes did their work."""
    on_gpu = options.device.type == "cuda"
    figures = "images/s", "trials an hour", "times one"
    print(f"\nWidth {width:g}, {options.height}x{options.width} px, batch 1, {options.threads} CPU threads in all\n")
    shown = Table("trials", *(f"{how}: {name}" for how in HOW for name in figures))
    one = None
    for count in options.counts:
        gpus = (1.0 if count == 1 else math.floor(1000 / count) / 1000) if on_gpu else 0.0
        threads = max(1, options.threads // count)
        config = config_of(options, width=width)
        work = Work(config, cache.samples, cache.directory.parent, gpus, threads, options.seconds)
        try:
            rate = processes(work, count)
        except RuntimeError as error:
            shown.add(count, error, "", "", "", "", "")
            continue
        one = one or rate / count
        whole = work._replace(gpus=float(on_gpu), threads=options.threads)
        shown.add(count, *cells(rate, one), *cells(packed_rate(whole, count), one))
    return one is not None


def cells(rate: float | None, one: float) -> tuple[str, str, str]:
    """Of images a second."""
    if rate is None:
        return "not there", "", ""
    return f"{rate:.1f}", f"{rate * 3600 / (EPOCHS * IMAGES):.2f}", f"{rate / one:.2f}"


def main() -> int:
    """Prints Markdown tables; 1 where nothing could be measured."""
    options = options_of(
        __doc__,
        5,
        counts={"type": int, "nargs": "+", "default": [1, 2, 4, 8, 16], "help": "of trials side by side"},
        width_factors={"type": float, "nargs": "+", "default": [1.0, 0.25]},
    )
    with split_of(options) as cache:
        measured = [compare(options, cache, width) for width in options.width_factors]
    return 0 if all(measured) else 1


if __name__ == "__main__":
    sys.exit(main())
