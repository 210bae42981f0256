"""When steps are recorded, and what happens where they cannot be. What a recording does needs CUDA: bench/gpu.py."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from model import step
from model.sample import Batch
from model.step import STEPS_BEFORE_RECORDING, FiniteCheck, Recorder


def batch_of(size: int, side: int = 16) -> Batch:
    images, targets = torch.zeros(size, 3, side, side), torch.zeros(size, 1, side, side)
    return Batch(images, targets, None, torch.zeros(size, 1), torch.zeros(size), np.arange(size))


class Recording:
    """Takes the place of a CUDA graph."""

    def play(self, batch: Batch) -> Tensor:
        return torch.full((len(batch.rows),), 2.0)


def one_by_one(batch: Batch) -> Tensor:
    return torch.ones(len(batch.rows))


def recorder() -> Recorder:
    def record(_function, batch: Batch, _pool) -> Recording:
        sizes.append(len(batch.rows))
        return Recording()

    sizes: list[int] = []
    made = Recorder(True, record)
    made.sizes = sizes
    return made


def test_a_size_is_recorded_once_it_has_come_a_few_times() -> None:
    run = recorder()
    answers = [float(run(one_by_one, batch_of(4))[0]) for _ in range(STEPS_BEFORE_RECORDING + 3)]
    assert answers == [1.0] * STEPS_BEFORE_RECORDING + [2.0] * 3
    assert float(run(one_by_one, batch_of(3))[0]) == 1.0
    assert run.sizes == [4]


def test_without_recording_each_step_is_run() -> None:
    run = Recorder(False)
    assert all(float(run(one_by_one, batch_of(2))[0]) == 1.0 for _ in range(10))


def test_what_cannot_be_recorded_is_run_and_said_once(caplog) -> None:
    def record(*_: object) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing")

    run = Recorder(True, record)
    assert all(float(run(one_by_one, batch_of(2))[0]) == 1.0 for _ in range(10))
    assert [record.getMessage() for record in caplog.records] == [
        "training steps are not recorded, and slower for it: operation not permitted when stream is capturing"
    ]


def test_memory_that_runs_out_while_recording_is_not_hidden() -> None:
    def record(*_: object) -> Recording:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = Recorder(True, record)
    for _ in range(STEPS_BEFORE_RECORDING):
        run(one_by_one, batch_of(2))
    with pytest.raises(torch.OutOfMemoryError):
        run(one_by_one, batch_of(2))


def test_algorithms_are_tried_on_small_batches_alone_and_by_one_thread_at_a_time() -> None:
    """The choice is the whole process's; two threads that set it for themselves would leave it set."""
    seen: list[tuple[bool, int]] = []
    inside = 0

    def function(batch: Batch) -> Tensor:
        nonlocal inside
        inside += 1
        torch.ones(200_000).sum()  # lets other threads run
        seen.append((torch.backends.cudnn.benchmark, inside))
        inside -= 1
        return one_by_one(batch)

    threads = [
        threading.Thread(target=recorder(), args=(function, batch_of(1, side))) for side in (16, 448, 456, 16, 456)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(False, 1), (False, 1), (True, 1), (True, 1), (True, 1)]
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_no_number_is_seen(value: float) -> None:
    sums = torch.zeros(2)
    check = FiniteCheck(sums)
    assert check.look()
    sums[1] = value
    assert not check.look()


def test_on_a_processor_there_are_no_streams() -> None:
    with step.own_stream(torch.device("cpu")):
        step.give_memory_back()
