"""A trial's share of a GPU: it waits until the memory is free, and cannot take more."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from model.step import give_memory_back
from tuner.records import NodeUnfit

CONTEXT_BYTES = 600 * 2**20
"""What a process takes of a GPU for CUDA itself, at least as it is counted here; torch's limit does not count it."""

_LARGEST_CONTEXT_BYTES = 2 * CONTEXT_BYTES
"""Where CUDA seems to take more, that is memory of other processes."""

_SPARED = 0.1, 2**30
"""Part of a share, and bytes at least, that others may hold: a desktop, or the context of a process that is ending."""

_SECONDS_TO_WAIT = 60.0
"""A process that has ended gives its memory back within seconds."""

_SECONDS_BETWEEN_LOOKS = 0.2

_ROUNDING = 1e-6
"""of shares that add up to a GPU"""


def take(device: torch.device, share: float) -> None:
    """Waits for the memory of this process's share of a GPU (1 is all of it), and forbids it more. NodeUnfit if others
    keep the memory, or where the share of this GPU has no room for a tensor: other nodes may have larger ones."""
    properties = torch.cuda.get_device_properties(device)
    limit = tensor_share(share, properties.total_memory)
    name = f"GPU {properties.name}, {device}"
    wait_until_free(lambda: _free_bytes(device), wanted_bytes(share, properties.total_memory), name)
    torch.cuda.set_per_process_memory_fraction(limit, device)


def check_cuda() -> None:
    """NodeUnfit where torch cannot use the GPU that a trial holds: a silent CPU would take days."""
    if not torch.cuda.is_available():
        raise NodeUnfit("this trial holds a GPU, but torch finds no CUDA here; install a CUDA build of torch")


class Together:
    """The shares of a GPU that trials in one process hold: no trial can be kept from the memory of another, but all of
    them together from what is not theirs. On a CPU the shares are counted alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0.0
        self._changed = threading.Condition()

    @contextmanager
    def share(self, share: float) -> Iterator[None]:
        """Holds a share while a trial runs, and gives back what it took of the memory. It waits for its turn: a trial
        whose process was killed holds its share until it notices. NodeUnfit as for `take`."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            check_cuda()
        with self._changed:
            self._changed.wait_for(lambda: self._held + share <= 1 + _ROUNDING)
            self._hold(self._held + share)
        try:
            if on_gpu:
                properties = torch.cuda.get_device_properties(self._device)
                wanted = wanted_bytes(share, properties.total_memory)
                wait_until_free(self._free_bytes, wanted, f"GPU {properties.name}, {self._device}")
            yield
        finally:
            try:
                give_memory_back()
            finally:
                with self._changed:
                    self._hold(self._held - share)
                    self._changed.notify_all()

    def _hold(self, share: float) -> None:
        if self._device.type == "cuda" and share > _ROUNDING:
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(tensor_share(min(share, 1.0), total), self._device)
        self._held = share

    def _free_bytes(self) -> int:
        """With what this process keeps and does not use."""
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return _free_bytes(self._device) + kept


def still_answers(device: torch.device) -> bool:
    """Whether a device can be used after an error: what a kernel does wrong ends CUDA for the whole process."""
    try:
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


def tensor_share(share: float, total_bytes: int) -> float:
    """The part of a GPU's memory that torch may take for tensors: the share without CUDA's own memory. NodeUnfit if
    nothing is left."""
    if share >= 1:
        return 1.0
    found = share - CONTEXT_BYTES / total_bytes
    if found <= 0:
        raise NodeUnfit(
            f"a trial's share of a GPU must hold CUDA itself, about {_mib(CONTEXT_BYTES)}, and tensors, found "
            f"{share:g} of {_mib(total_bytes)}; raise --gpus-per-trial, or leave out nodes with so small a GPU"
        )
    return found


def wanted_bytes(share: float, total_bytes: int) -> int:
    """What must be free of a GPU, with this process's own context already there, before a trial takes its share."""
    promised = min(share, 1.0) * total_bytes
    part, least = _SPARED
    return max(0, int(promised - max(part * promised, least) - CONTEXT_BYTES))


def context_bytes(device: torch.device) -> int:
    """What CUDA itself takes of a GPU in this process, which has used it: all that is taken but torch's memory."""
    free, total = torch.cuda.mem_get_info(device)
    found = total - free - torch.cuda.memory_reserved(device)
    return min(max(int(found), CONTEXT_BYTES), _LARGEST_CONTEXT_BYTES)


def wait_until_free(
    free_bytes: Callable[[], int],
    wanted: int,
    name: str,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Returns as soon as so much memory is free. NodeUnfit if it is not within a minute: the trial before has ended,
    so something else holds it."""
    end = clock() + _SECONDS_TO_WAIT
    most = -math.inf
    while (free := free_bytes()) < wanted:
        most = max(most, free)
        if clock() >= end:
            raise NodeUnfit(
                f"{name} must have {_mib(wanted)} free for a trial, found at most {_mib(int(most))} for "
                f"{_SECONDS_TO_WAIT:.0f} s: another process holds the rest; end it (nvidia-smi lists what runs on the "
                "GPU), or lower --gpus-per-trial"
            )
        pause(_SECONDS_BETWEEN_LOOKS)


def _free_bytes(device: torch.device) -> int:
    """0 where there is not even room for CUDA's own memory."""
    try:
        return int(torch.cuda.mem_get_info(device)[0])
    except RuntimeError as error:
        if "out of memory" in str(error):
            return 0
        raise


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
