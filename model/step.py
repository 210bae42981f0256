"""A training step, which on CUDA is recorded and played back.

At one image a step, a GPU waits for Python: the step has some hundred kernels of a few microseconds each. So the first
batches of a size are trained kernel by kernel, then one step is recorded as a CUDA graph, and each later batch of that
size is one launch. A graph reads and writes fixed places in memory: what changes from step to step (the batch, the step
size, the weights of the losses) lies in tensors that keep their places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sample import Batch

STEPS_BEFORE_RECORDING = 3
"""of a size: libraries choose their algorithms in the first, and a size that is rare is not worth it"""

_POSITIONS_TO_TRY_WITH = 448 * 448
"""px of a batch"""

_recording = threading.Lock()
"""Several networks may be trained in one process; two recordings at once cannot be."""

StepFunction = Callable[[Batch], Tensor]
"""Trains by a batch; returns a tensor that says something of each image."""


class Recorder:
    """Runs a function of a batch that trains, where `records` by playing back what it did before."""

    def __init__(self, function: StepFunction, records: bool) -> None:
        self._function = function
        self._records = records
        self._seen: dict[int, int] = {}
        self._recorded: dict[int, _Recorded] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """What the function returns; valid until the next call."""
        if not self._records:
            return self._function(batch)
        size = len(batch.images_BCHW)
        if (recorded := self._recorded.get(size)) is None:
            self._seen[size] = self._seen.get(size, 0) + 1
            if self._seen[size] <= STEPS_BEFORE_RECORDING:
                with _best_algorithms(batch):
                    return self._function(batch)
            recorded = self._recorded[size] = _record(self._function, batch)
        return recorded.play(batch)


@contextmanager
def _best_algorithms(batch: Batch) -> Iterator[None]:
    """Lets cuDNN try its algorithms for convolutions that it has not seen yet, where that takes seconds. On few
    positions its guesses are bad; for many, to try takes minutes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or batch.targets_B1HW.numel() <= _POSITIONS_TO_TRY_WITH
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    result: Tensor

    def play(self, batch: Batch) -> Tensor:
        for place, value in zip(_tensors(self.batch), _tensors(batch), strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.result


def _record(function: StepFunction, batch: Batch) -> _Recorded:
    """Nothing is trained while it is recorded."""
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
        with _recording, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = function(places)
    except RuntimeError as error:
        earlier = error.__context__  # an end of recording that fails hides why it came
        raise earlier if isinstance(earlier, torch.OutOfMemoryError) else error from None
    return _Recorded(graph, places, result)


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in batch if isinstance(value, Tensor)]


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream beside the common one, on which recording is not allowed; waits for what is under way, and whoever
    comes after waits for it."""
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        yield
        return
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


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
