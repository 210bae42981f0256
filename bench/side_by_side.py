"""Trials an hour on one device: so many side by side as processes with a share of it each, and packed as one.

    python -m bench.side_by_side [--counts 1 2 4 8 16] [--width-factors 1 0.25] [--seconds 5] [--device cpu]

A trial is the training of the results page, 50 epochs of 7,908 images at batch 1, of which some seconds are measured
with all processes at work; starting them and validations are not in it. Times one are the ratio to one process.
Packed trials are threads of one process (tuner/pack.py).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure import Table, config_of, options_of, split_of
from bench.plain import images_in
from bench.schedule import EPOCHS, IMAGES
from bench.training_step import Fast, fitting
from model.config import RunConfig
from model.data import Cache, open_cache
from model.sample import Sample
from tuner.pack import side_by_side
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


def packed(work: Work, counts: Sequence[int]) -> list[float]:
    """Images a second of so many trials together, each in a thread of this process: for one count after another."""
    device = take_device(work.gpus, work.threads)
    cache = open_cache(work.samples, work.config.input_height, work.config.input_width, work.root)
    first = Fast(work.config, device)
    split = fitting(first, cache, device, work.seconds / 4)
    trials = [first, *(Fast(work.config, device) for _ in range(max(counts) - 1))]
    rates = []
    for count in counts:
        met = threading.Barrier(count)

        def one(fast: Fast, met: threading.Barrier = met) -> float:
            fast.epoch(split)  # the first epoch of a trial records its step
            met.wait(_SECONDS_TO_START)
            began, done, passed = time.perf_counter(), 0, 0.0
            while True:  # epochs that ended while all were at work; one at least
                fast.epoch(split)
                if (now := time.perf_counter() - began) > work.seconds and done:
                    return done / passed
                done, passed = done + images_in(split, work.config), now

        functions = [partial(one, fast) for fast in trials[:count]]
        rates.append(sum(side_by_side(functions, device, max(1, work.threads // count))))
    return rates


def compare(options: argparse.Namespace, cache: Cache, width: float) -> bool:
    """Prints a table for a network's width; whether any trials did their work."""
    on_gpu = options.device.type == "cuda"
    config = config_of(options, width=width)
    whole = Work(config, cache.samples, cache.directory.parent, float(on_gpu), options.threads, options.seconds)
    found: dict[str, list[float]] = {}
    if "packed" in options.how:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found["packed"] = pool.submit(packed, whole, options.counts).result()
    figures = "images/s", "trials an hour", "times one"
    print(f"\nWidth {width:g}, {options.height}x{options.width} px, batch 1, {options.threads} CPU threads in all\n")
    shown = Table("trials", *(f"{how}: {name}" for how in options.how for name in figures))
    one = None
    for n, count in enumerate(options.counts):
        rates: dict[str, float | RuntimeError] = {how: each[n] for how, each in found.items()}
        if "processes" in options.how:
            gpus = (1.0 if count == 1 else math.floor(1000 / count) / 1000) if on_gpu else 0.0
            try:
                rates["processes"] = processes(
                    whole._replace(gpus=gpus, threads=max(1, options.threads // count)), count
                )
            except RuntimeError as error:
                rates["processes"] = error
        first = rates[options.how[0]]
        if one is None and not isinstance(first, RuntimeError):
            one = first / count
        shown.add(count, *(cell for how in options.how for cell in cells(rates[how], one)))
    return one is not None


def cells(rate: float | RuntimeError, one: float | None) -> tuple[str, str, str]:
    """Of images a second."""
    if isinstance(rate, RuntimeError) or one is None:
        return str(rate), "", ""
    return f"{rate:.1f}", f"{rate * 3600 / (EPOCHS * IMAGES):.2f}", f"{rate / one:.2f}"


def main() -> int:
    """Prints Markdown tables; 1 where nothing could be measured."""
    options = options_of(
        __doc__,
        5,
        counts={"type": int, "nargs": "+", "default": [1, 2, 4, 8, 16], "help": "of trials side by side"},
        width_factors={"type": float, "nargs": "+", "default": [1.0, 0.25]},
        how={"nargs": "+", "default": HOW, "choices": HOW, "help": "the first one is what others are compared with"},
    )
    with split_of(options) as cache:
        measured = [compare(options, cache, width) for width in options.width_factors]
    return 0 if all(measured) else 1


if __name__ == "__main__":
    sys.exit(main())
