"""A share of a GPU as arithmetic, and the wait for it on a clock of its own. What needs a GPU is bench/gpu.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner import gpu, shares
from tuner.records import NodeUnfit

GIB = 2**30


class Clock:
    """Time that passes when somebody pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def test_a_trial_begins_as_soon_as_the_memory_is_free() -> None:
    clock = Clock()
    gpu.wait_until_free(lambda: 40 * GIB if clock() >= 3 else 10 * GIB, 40 * GIB, "GPU", clock, clock.pause)
    assert 3 <= clock() < 3.5
    gpu.wait_until_free(lambda: 40 * GIB, 40 * GIB, "GPU", clock, clock.pause)
    assert clock() < 3.5


def test_memory_that_others_keep_is_a_problem_of_the_node() -> None:
    clock = Clock()
    free = iter([2 * GIB, 5 * GIB])
    with pytest.raises(
        NodeUnfit,
        match="GPU H, cuda:0 must have 40,960 MiB free for a trial, found at most 5,120 MiB for 60 s: another process "
        r"holds the rest; end it \(nvidia-smi lists",
    ):
        gpu.wait_until_free(lambda: next(free, GIB), 40 * GIB, "GPU H, cuda:0", clock, clock.pause)
    assert 60 <= clock() < 61


@given(st.integers(2, 8), st.integers(8 * GIB, 192 * GIB))
def test_trials_side_by_side_promise_no_more_than_there_is(count: int, total: int) -> None:
    share = 1 / count
    tensors = gpu.tensor_share(share, total) * total
    assert (tensors + gpu.CONTEXT_BYTES) * count == pytest.approx(total)
    others = (count - 1) * share * total  # at their limits, and our own context is there when we look
    assert total - others - gpu.CONTEXT_BYTES >= gpu.wanted_bytes(share, total)
    assert gpu.wanted_bytes(1.0, total) >= 0.8 * total - GIB - gpu.CONTEXT_BYTES


def test_a_share_without_room_for_a_tensor_is_refused() -> None:
    assert gpu.tensor_share(1.0, 8 * GIB) == 1.0
    with pytest.raises(NodeUnfit, match=r"must hold CUDA itself, about 600 MiB, and tensors, found 0.05 of 8,192 MiB"):
        gpu.tensor_share(0.05, 8 * GIB)


@given(st.integers(1, 200 * GIB), st.integers(8 * GIB, 192 * GIB), st.integers(1, 200))
def test_the_part_of_a_gpu_holds_a_trial_and_wastes_none(trial: int, total: int, most: int) -> None:
    part = shares.part_of_gpu(trial, total, most)
    fit = int(1 / part)
    assert fit * part <= 1
    assert fit <= most
    assert part == 1 or part * total >= trial
    assert round(part, 4) == part
    if fit < min(most, 90):  # one more would not have fitted, but for the digits that are cut
        assert (fit + 1) * trial > total * (1 - 2e-4 * (fit + 1))


def test_thirds_are_cut_so_that_three_fit() -> None:
    assert shares.part_of_gpu(20 * GIB, 80 * GIB, 3) == 0.33
    assert shares.part_of_gpu(20 * GIB, 80 * GIB, 16) == 0.25
    assert shares.part_of_gpu(41 * GIB, 80 * GIB, 16) == 1.0
    assert shares.part_of_gpu(int(80 / 3 * GIB) - 2**26, 80 * GIB, 16) == 0.3333


def test_a_trial_has_its_gpus_part_of_the_cores() -> None:
    assert shares.cores_each(16, 2, 1.0) == 8
    assert shares.cores_each(16, 2, 0.33) == 2
    assert shares.cores_each(16, 8, 0.25) == 1
    assert shares.cores_each(64, 8, 4) == 32
    assert shares.most_on_a_gpu(16, 2, None) == 8
    assert shares.most_on_a_gpu(16, 2, 3) == 2
    assert shares.most_on_a_gpu(1, 2, None) == 1
