"""A training step, which on CUDA is recorded and played back.

At one image a step, a GPU waits for Python: the step has some hundred kernels of a few microseconds each. So the first
batches of a size are trained kernel by kernel, then one step is recorded as a CUDA graph, and each later batch of that
size is one launch. A graph reads and writes fixed places in memory: what changes from step to step (the batch, the step
size, the weights of the losses) lies in tensors that keep their places.

Several networks may be trained in one process, each in a thread of its own (tuner/pack.py).
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from model.sample import Batch

logger = logging.getLogger(__name__)

STEPS_BEFORE_RECORDING = 3
"""of a size: libraries choose their algorithms in the first, and a size that is rare is not worth it"""

_POSITIONS_TO_TRY_WITH = 448 * 448
"""px of a batch"""

_alone = threading.RLock()
"""Held by the one thread that does what the whole process must not be in the middle of: recording, trying algorithms,
giving memory back."""

StepFunction = Callable[[Batch], Tensor]
"""Trains by a batch; returns a tensor that says something of each image."""


class Recorded(Protocol):
    """A step that can be played back."""

    def play(self, batch: Batch) -> Tensor:
        """Trains by another batch of the same size."""


class Recorder:
    """Runs a function of a batch that trains, where `records` by playing back what it did before."""

    def __init__(self, records: bool, record: Callable[[StepFunction, Batch, Any], Recorded] | None = None) -> None:
        self._records = records
        self._record = record or _record
        self._pool = torch.cuda.graph_pool_handle() if records and torch.cuda.is_available() else None
        self._seen: dict[int, int] = defaultdict(int)
        self._recorded: dict[int, Recorded] = {}

    def __call__(self, function: StepFunction, batch: Batch) -> Tensor:
        """What the function returns; valid until the next call."""
        if not self._records:
            return function(batch)
        size = len(batch.images_BCHW)
        if (recorded := self._recorded.get(size)) is None:
            self._seen[size] += 1
            if self._seen[size] <= STEPS_BEFORE_RECORDING:
                with first_of_its_shape(tries=batch.targets_B1HW.numel() <= _POSITIONS_TO_TRY_WITH):
                    return function(batch)
            try:
                with _alone:
                    recorded = self._recorded[size] = self._record(function, batch, self._pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # nothing was trained meanwhile
                logger.warning("training steps are not recorded, and slower for it: %s", error)
                self._records = False
                self._recorded.clear()
                return function(batch)
        return recorded.play(batch)


@contextmanager
def first_of_its_shape(tries: bool) -> Iterator[None]:
    """For convolutions that cuDNN may not have seen: whether it tries its algorithms, or guesses. On few positions its
    guesses are bad; for many, to try takes minutes. One thread at a time, since the choice is the whole process's."""
    with _alone:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = tries
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


def give_memory_back() -> None:
    """Frees what torch keeps of a GPU for tensors that are gone."""
    gc.collect()  # networks hang in circles
    with _alone:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    result: Tensor

    def play(self, batch: Batch) -> Tensor:
        for place, value in zip(_tensors(self.batch), _tensors(batch), strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.result


def _record(function: StepFunction, batch: Batch, pool: Any) -> _Graph:
    """Nothing is trained while it is recorded. Graphs of one pool share their memory, so they are played one at a time,
    and what one returns is gone with the next."""
    places = batch._replace(
        images_BCHW=batch.images_BCHW.clone(),
        targets_B1HW=batch.targets_B1HW.clone(),
        weights_B1HW=None if batch.weights_B1HW is None else batch.weights_B1HW.clone(),
        labels_B1=batch.labels_B1.clone(),
        segmented_B=batch.segmented_B.clone(),
    )
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = function(places)
    except RuntimeError as error:
        earlier = error.__context__  # an end of recording that fails hides why it came
        raise earlier if isinstance(earlier, torch.OutOfMemoryError) else error from None
    return _Graph(graph, places, result)


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in batch if isinstance(value, Tensor)]


@dataclass
class _Streams:
    """Those of this process that nobody has. torch hands out 32, again and again: two trials could get one."""

    free: dict[torch.device, list[torch.cuda.Stream]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, device: torch.device) -> torch.cuda.Stream:
        with self.lock:
            return self.free[device].pop() if self.free[device] else torch.cuda.Stream(device)

    def give_back(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        with self.lock:
            self.free[device].append(stream)


_streams = _Streams()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream that no other thread uses meanwhile, unless this thread has one: on the common one nothing can be
    recorded. It waits for what is under way, and whoever comes after waits for it."""
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        yield
        return
    outer, stream = torch.cuda.current_stream(device), _streams.take(device)
    try:
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)
        _streams.give_back(device, stream)


class FiniteCheck:
    """Says that a sum is no longer a finite number, a little late, so that nothing waits for the device."""

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums
        self._copy = torch.zeros_like(sums, device="cpu", pin_memory=sums.is_cuda)
        self._copied = torch.cuda.Event() if sums.is_cuda else None
        self._pending = False

    def look(self) -> bool:
        """Whether the sum was finite at the last look (on a CPU: is)."""
        if self._copied is None:
            return bool(torch.isfinite(self._sums).all())
        finite = True
        if self._pending:
            self._copied.synchronize()
            finite = bool(torch.isfinite(self._copy).all())
        self._copy.copy_(self._sums, non_blocking=True)
        self._copied.record()
        self._pending = True
        return finite
