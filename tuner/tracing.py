"""A trace of a trial: some training steps at the end of an epoch, the validation after them, the checkpoint of that.

What the trial computes stays the same to the bit; it takes longer meanwhile. Without `--profile` nothing of this runs
but the marks, once an epoch.
"""

from __future__ import annotations

import gzip
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model.data import Cache, step_rows
from model.train import Training

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""of a run, and of a trial that is in none"""

TRACE = "trace.json.gz"
SUMMARY = "summary.txt"
"""written last"""

STEPS = 20
"""that are recorded"""

WARM_UP = 10
"""steps that must come before them, where a later epoch leaves room for that"""

_ROWS = 25
_STEP = "training step"

mark = record_function
"""Names a part of a trial in a trace."""


class Recorder:
    """Watches a training from outside, and records once. Its files appear in the folder when they are whole."""

    def __init__(self, folder: Path, training: Training, cache: Cache) -> None:
        self._folder, self._training, self._cache = folder, training, cache
        self._seen = 0
        self._is_over = False
        self._profile: profile | None = None
        self._began = 0.0
        self._step: Any = None
        training.after_step = self._stepped
        self._await_epoch()

    def _await_epoch(self) -> None:
        """Decides at which step of the coming epoch to begin, if in that one: 0 is before its first."""
        config, epoch = self._training.config, self._training.epochs_done
        self._left = self._of_epoch = sum(1 for _ in step_rows(self._cache, config, epoch))
        begin = max(0, self._of_epoch - STEPS)
        is_warm = self._seen + begin >= WARM_UP or epoch + 1 == config.epochs
        self._begin_with_left = self._of_epoch - begin if is_warm else None
        self._begin_if_due()

    def _begin_if_due(self) -> None:
        if self._left == self._begin_with_left:
            on_gpu = [ProfilerActivity.CUDA] if self._training.device.type == "cuda" else []
            if on_gpu:  # recorded steps do not outlive what the profiler would end with itself
                os.environ.setdefault("TEARDOWN_CUPTI", "0")
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()
            self._began = time.perf_counter()
            self._open_step()

    def _stepped(self) -> None:
        self._seen += 1
        self._left -= 1
        if self._profile is None:
            self._begin_if_due()
            return
        self._close_step()
        if self._left > 0:
            self._open_step()

    def _open_step(self) -> None:
        self._step = record_function(_STEP)
        self._step.__enter__()

    def _close_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def epoch_ended(self) -> None:
        """An epoch has been judged and kept: what was recorded of it is written."""
        if self._is_over:
            return
        if self._profile is None:
            self._await_epoch()
            return
        self._close_step()
        seconds = time.perf_counter() - self._began
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._is_over = True
        self._training.after_step = None
        try:
            self._write(recorded, seconds)
        except Exception as error:  # a full disk, say: the trial has nothing to do with it
            logger.warning("there is no trace of the trial: %s", error)

    def _write(self, recorded: profile, seconds: float) -> None:
        plain = self._folder / "trace.json"
        recorded.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(self._folder / TRACE, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        building = self._folder / f"{SUMMARY}.part"
        building.write_text(self._summary(recorded, seconds))
        building.replace(self._folder / SUMMARY)

    def _summary(self, recorded: profile, seconds: float) -> str:
        training = self._training
        device = torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else platform.machine()
        averages = recorded.key_averages()
        phases = [event for event in averages if event.key in (_STEP, *PHASES) and event.device_type.name == "CPU"]
        lines = [
            f"epoch {training.epochs_done} on {device}, torch {torch.__version__}: the last of its {self._of_epoch} "
            f"training steps, the validation after them and its checkpoint; {seconds:.3f} s in all",
            f"open {TRACE} in https://ui.perfetto.dev or chrome://tracing",
            "",
            f"{'part':<24}{'times':>8}{'seconds':>10}{'ms each':>10}{'share':>9}",
        ]
        for event in sorted(phases, key=lambda event: -event.cpu_time_total):
            total = event.cpu_time_total / 1e6
            lines.append(
                f"{event.key:<24}{event.count:>8}{total:>10.3f}{1000 * total / event.count:>10.2f}"
                f"{100 * total / seconds:>7.1f} %"
            )
        on_gpu = training.device.type == "cuda"
        lines += ["", averages.table("self_device_time_total" if on_gpu else "self_cpu_time_total", row_limit=_ROWS)]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        """Leaves the training as it was, and records nothing more."""
        self._training.after_step = None
        self._close_step()
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


PHASES = ("validation", "thresholds", "weights", "pictures", "training state", "checkpoint", "report")
"""the other marks, in their order"""


class _Nobody:
    """Records nothing."""

    def epoch_ended(self) -> None:
        """Nothing."""


@contextmanager
def recorded(folder: Path | None, training: Training, cache: Cache) -> Iterator[Recorder | _Nobody]:
    """Records the training within into a folder, unless there is none, or it has been recorded there."""
    if folder is None or (folder / SUMMARY).exists():
        yield _Nobody()
        return
    with ExitStack() as stack:
        recorder = Recorder(folder, training, cache)
        stack.callback(recorder.close)
        yield recorder


def keep(folder: Path, trial: str, found: dict[str, bytes]) -> None:
    """Writes what was recorded of a trial elsewhere into a folder, which is whole or not there."""
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name, data in found.items():
        (building / name).write_bytes(f"trial {trial}, ".encode() + data if name == SUMMARY else data)
    building.rename(folder)


def files(folder: Path) -> dict[str, bytes]:
    """What was recorded, by name, if it is whole."""
    return {name: (folder / name).read_bytes() for name in (TRACE, SUMMARY)} if (folder / SUMMARY).exists() else {}
