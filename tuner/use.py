"""What a trial uses of its machine, read in the process that runs it.

`cpu_percent`: time on CPU cores, of all threads, over the time that passed; 100 is one core.
`memory_mib`: memory that is the process's own at the moment (RssAnon in /proc/self/status, so on Linux alone). Files
that it maps are not in it: the cache of decoded images is shared by all trials, and the kernel takes it back at need.
`device_percent`: how much of the time a kernel ran on the GPU, the mean over the epoch as NVML samples it, where
nvidia-ml-py is installed. Of the whole GPU: where trials share one, that of the others too.
`device_memory_mib`: the most that torch held for tensors on the GPU at once.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

_MIB = 2**20
_SECONDS_BETWEEN_SAMPLES = 1.0
"""NVML's own sample is of the last 1/6 to 1 s."""


class Meter:
    """Reads what was used since the last reading, the first time since it was made. Never fails: what cannot be read is
    left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._time, self._cpu = time.monotonic(), time.process_time()
        self._busy = Sampler(self._utilisation, _SECONDS_BETWEEN_SAMPLES) if device.type == "cuda" else None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._busy:
            self._busy.stop()

    def read(self) -> dict[str, float]:
        now, cpu = time.monotonic(), time.process_time()
        found = {"cpu_percent": 100 * (cpu - self._cpu) / max(now - self._time, 1e-9)}
        self._time, self._cpu = now, cpu
        if (own := _own_memory_mib()) is not None:
            found["memory_mib"] = own
        if self._busy and (percent := self._busy.mean()) is not None:
            found["device_percent"] = percent
        # Trials of one process share the peak, since any of them read it last.
        if self._device.type == "cuda" and torch.cuda.is_initialized():
            found["device_memory_mib"] = torch.cuda.max_memory_allocated(self._device) / _MIB
            torch.cuda.reset_peak_memory_stats(self._device)
        return found

    def _utilisation(self) -> float | None:
        return torch.cuda.utilization(self._device) if torch.cuda.is_initialized() else None


class Sampler:
    """Calls a function again and again in a thread, until it fails or this is stopped; None is no sample.

    One look at the end of an epoch would fall between training and validation, when a GPU does nothing.
    """

    def __init__(self, sample: Callable[[], float | None], seconds_between: float) -> None:
        self._sample, self._seconds = sample, seconds_between
        self._found: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-use", daemon=True)
        self._thread.start()

    def mean(self) -> float | None:
        """Of the samples since the last call; None without one."""
        found, self._found = self._found, []
        return sum(found) / len(found) if found else None

    def stop(self) -> None:
        """Without waiting: a driver that hangs must not hold up the end of a trial."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                value = self._sample()
            except Exception:  # no nvidia-ml-py, or a driver that does not say, as with MIG
                return
            if value is not None:
                self._found.append(value)


def _own_memory_mib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^RssAnon:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else None
