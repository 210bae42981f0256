"""This machine, and how long a configuration takes on it: a few training steps and judged images."""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model import checkpoint, splits, train
from model.config import RunConfig
from model.data import Cache, open_cache
from model.evaluate import Scores, score
from model.inspection import Read
from model.sample import Sample
from model.splits import Splits
from model.step import STEPS_BEFORE_RECORDING, give_memory_back
from tuner import gpu
from tuner.scratch import scratch_folder
from tuner.shares import cores_each
from tuner.space import Space
from tuner.trial import TrialTask, plain_rules, take_device, with_less_memory

TIMED_STEPS = 2
"""at least, and more while they take less than _TIMED_SECONDS together: single short steps vary"""

_TIMED_SECONDS = 0.5

_STEPS_ON_A_GPU = 2 * (STEPS_BEFORE_RECORDING + 1)
"""of an epoch that is timed: what surrounds an epoch takes as long as some steps there"""

_JUDGED_IMAGES = 8
"""Validation images that are judged: as many as the network sees at a time there."""


@dataclass(frozen=True, kw_only=True)
class Corner:
    """A configuration that was timed."""

    names: tuple[str, ...]
    config: RunConfig
    step_seconds: float
    image_seconds: float
    """of a validation image: the network and its count table"""
    epoch_seconds: float
    """what else an epoch takes, however many images: thresholds, a checkpoint"""
    memory_bytes: int
    """at the peak, of training and judging; see `_memory`"""
    micro_batch: int
    """smaller than was asked for where memory ran out"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a trial would run, and what it holds there."""

    name: str
    on_gpu: bool
    memory_bytes: int
    """of a GPU, or of the machine"""
    cores: int = 1
    gpus: int = 0
    devices_per_trial: float
    """what a trial is charged for: GPUs, or cores where it has none"""
    concurrent: int


@contextmanager
def machine(cpus: float | None, gpus: float | None, concurrent: int | None) -> Iterator[tuple[Machine, torch.device]]:
    """This machine, with a search's own defaults: a whole GPU a trial where there is one, or one core. Torch has a
    trial's threads meanwhile. ValueError if a trial asks for more than there is."""
    there = {"cpus": os.cpu_count() or 1, "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    gpus = gpus if gpus is not None else float(there["gpus"] > 0)
    cpus = cpus if cpus is not None else cores_each(there["cpus"], there["gpus"], gpus) if gpus else 1.0
    asked = {"cpus": cpus, "gpus": gpus}
    for name, wanted in asked.items():
        if wanted > there[name]:
            raise ValueError(
                f"a trial must fit the machine that it is planned on: it asks for {wanted:g} {name}, found "
                f"{there[name]}; lower --{name}-per-trial"
            )
    threads = torch.get_num_threads()
    device = take_device(gpus, int(cpus))
    fit = min(int(there[name] / wanted + 1e-9) for name, wanted in asked.items() if wanted)
    on_gpu = device.type == "cuda"
    found = Machine(
        name=gpu_of(device)[0] if on_gpu else f"CPU, {cpus:g} core{'s' * (cpus != 1)} a trial",
        on_gpu=on_gpu,
        memory_bytes=gpu_of(device)[1] if on_gpu else _memory_of_machine(),
        cores=there["cpus"],
        gpus=there["gpus"],
        devices_per_trial=gpus or cpus,
        concurrent=concurrent or max(1, fit),
    )
    try:
        yield found, device
    finally:
        torch.set_num_threads(threads)


def gpu_of(device: torch.device) -> tuple[str, int]:
    """A GPU's name, and the bytes of its memory."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory


def _memory_of_machine() -> int:
    """Bytes; those of the control group where it has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is no such group, or it has no limit
        return total


def time_corner(
    space: Space,
    found: Splits,
    names: tuple[str, ...],
    config: RunConfig,
    device: torch.device,
    gpus: float = 1,
    read: Read = Path.read_bytes,
) -> Corner:
    """Times a configuration on a few images, in smaller parts where memory runs out, as a trial would go on too. Of
    several GPUs a trial, what one of them does is timed here; adding up their gradients is left out."""
    team = max(1, int(gpus))
    small = config
    while True:
        try:
            return _time_once(space, found, names, small, device, team, read)
        except (MemoryError, RuntimeError) as error:
            try:
                small = with_less_memory(small, error, team)
            except MemoryError as hopeless:
                raise ValueError(f"{', '.join(names)}: {hopeless}") from error
            if device.type == "cuda":
                give_memory_back()


def _time_once(
    space: Space,
    found: Splits,
    names: tuple[str, ...],
    config: RunConfig,
    device: torch.device,
    team: int,
    read: Read,
) -> Corner:
    kept = splits.keep_masks(found.train, config.num_segmented, config.seed)
    size = config.input_height, config.input_width
    with scratch_folder() as root, _memory(device) as memory:
        batch = _balanced(kept, math.ceil((config.batch_size + config.hard_mining_places) / team))
        cache = open_cache(batch, *size, root, read)
        validation = open_cache(_spread(found.validation, _JUDGED_IMAGES), *size, root, read)
        # A batch holds the hard images as well. So small a step size changes no cost, and diverges nowhere.
        timed = replace(config, batch_size=len(batch), hard_mining_places=0, learning_rate=1e-4)
        training = train.start(timed, device)
        steps = 1 if device.type == "cpu" else _STEPS_ON_A_GPU
        repeated = cache.part(list(range(len(batch))) * steps, batch * steps)
        train.train_epoch(training, repeated)  # not timed: the first steps load, compile and record
        step_seconds = _mean_seconds(lambda: train.train_epoch(training, repeated), device) / steps
        if device.type == "cuda" and len(batch) > 1:  # an epoch may end with fewer
            fewer = replace(training, config=replace(timed, batch_size=len(batch) - 1))
            train.train_epoch(fewer, cache)
        image_seconds, judging_seconds = _time_judging(space, training, validation, config, device)
        started = time.perf_counter()
        checkpoint.save_training(root, training.state())
        saving = time.perf_counter() - started
    return Corner(
        names=names,
        config=config,
        step_seconds=step_seconds,
        image_seconds=image_seconds,
        epoch_seconds=judging_seconds + 2 * saving,  # written once, and copied to where checkpoints lie
        memory_bytes=memory[0],
        micro_batch=config.micro_batch,
    )


def _time_judging(
    space: Space, training: train.Training, validation: Cache, config: RunConfig, device: torch.device
) -> tuple[float, float]:
    """Seconds of an image, and seconds however many there are, of judging a network in all the ways that a trial
    does."""
    task = TrialTask([], [], space.objective.metric, space.scheduler.compare, space.replayed_values())
    own = task.judgements(config)
    judgements = list(dict.fromkeys([*own, *plain_rules(own)]))
    factors = tuple({judgement.threshold_factor for judgement in own})

    def judge(scores: Scores) -> float:
        started = time.perf_counter()
        scores.figures([scores.choose(judgement) for judgement in judgements])
        return time.perf_counter() - started

    few = replace(validation, samples=validation.samples[:2], images=validation.images[:2], masks=validation.masks[:2])
    warm = score(training.network, few, config, device, factors)
    judge(warm)
    of_few = judge(replace(warm))  # a copy, which has not kept its answers
    started = time.perf_counter()
    scores = score(training.network, validation, config, device, factors)
    forward = (time.perf_counter() - started) / len(validation.samples)
    of_all = judge(scores)
    more = len(validation.samples) - len(few.samples)
    each = max(0.0, (of_all - of_few) / more) if more else of_all / len(validation.samples)
    return forward + each, max(0.0, of_all - each * len(validation.samples))


def _balanced(samples: list[Sample], count: int) -> list[Sample]:
    """So many training images, both classes as in an epoch, or as many as an epoch has; all of them are in each epoch
    of a cache that holds them alone."""
    positives = [sample for sample in samples if sample.positive]
    negatives = [sample for sample in samples if not sample.positive]
    count = min(count, len(positives) + min(len(positives), len(negatives)))
    of_negatives = min(count // 2, len(negatives))
    return _spread(positives, count - of_negatives) + _spread(negatives, of_negatives)


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """At most so many, evenly spread over the list."""
    count = min(count, len(samples))
    return [samples[int(n)] for n in np.linspace(0, len(samples) - 1, count).round()] if count else []


def _mean_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of some calls, with all that they leave the device to do."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    started, steps = time.perf_counter(), 0
    while steps < TIMED_STEPS or time.perf_counter() - started < _TIMED_SECONDS:
        step()
        finish()
        steps += 1
    return (time.perf_counter() - started) / steps


@contextmanager
def _memory(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, afterwards, the most bytes that were in use: on a GPU those that torch held for tensors, in
    use or not, and those of CUDA itself; else all that this process held in memory, its libraries too."""
    found: list[int] = []
    if device.type == "cuda":
        give_memory_back()
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(int(torch.cuda.max_memory_reserved(device)) + gpu.context_bytes(device))
        return
    gc.collect()  # networks hang in circles
    most, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    found.append(most[0])


def _resident() -> int:
    """Bytes of this process in memory; where the system does not say, the most there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
