"""The fan-out: a tracker that fails is switched off, the others get everything."""

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tuner import tracking
from tuner.tracking import RunInfo, TensorBoardTracker, TerminalTracker, Tracker, Trackers, WandbTracker

RUN = RunInfo("cracks", "3fa91c", Path("nowhere"), {}, {"dilate": 1}, 10, None, "dice_mean", "max")
EVENTS = ["search_started", "trial_started", "epoch_ended", "trial_ended", "search_ended"]


class Recording(Tracker):
    def __init__(self) -> None:
        self.events: list[str] = []
        for event in EVENTS:
            setattr(self, event, partial(self._note, event))

    def _note(self, event: str, *values: Any) -> None:
        self.events.append(event)


class Failing(Tracker):
    name = "the recorder"

    def __init__(self, event: str) -> None:
        self.calls = 0
        self.closed = 0
        setattr(self, event, self._fail)

    @property
    def way_back(self) -> str:
        return "copy the tape"

    def _fail(self, *values: Any) -> None:
        self.calls += 1
        raise OSError("disk [full]")

    def close(self) -> None:
        self.closed += 1
        raise RuntimeError("nor can it be closed")


def drive(tracker: Tracker) -> None:
    tracker.search_started(RUN)
    for number in range(2):
        tracker.trial_started(f"3fa91c-{number:04d}", {"dilate": 3}, {"dilate": 3}, [])
        tracker.epoch_ended(f"3fa91c-{number:04d}", {"epoch": 1, "value": 0.5}, {}, {})
        tracker.trial_ended({"trial": f"3fa91c-{number:04d}", "status": "completed"})
    tracker.search_ended("finished")


@pytest.mark.parametrize("event", EVENTS)
def test_a_tracker_that_raises_is_reported_once_and_switched_off(event, caplog) -> None:
    before, failing, after = Recording(), Failing(event), Recording()
    with caplog.at_level(logging.DEBUG):
        drive(Trackers([before, failing, after]))
    assert before.events == after.events == [EVENTS[0], *EVENTS[1:4] * 2, EVENTS[4]]
    assert (failing.calls, failing.closed) == (1, 1)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].getMessage() == (
        "the recorder is switched off, for it failed (OSError: disk [full]); the search goes on; copy the tape"
    )
    assert warnings[0].exc_info is None
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.DEBUG)


def test_an_interrupt_is_not_a_failure_of_a_tracker() -> None:
    class Interrupted(Tracker):
        def search_ended(self, state: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(Trackers([Interrupted()]))


def test_doing_nothing_is_the_default() -> None:
    drive(Tracker())
    drive(Trackers())


def test_build_makes_what_was_asked_for() -> None:
    def kinds(trackers: Trackers) -> list[type]:
        return [type(tracker) for tracker in trackers._live]

    assert kinds(tracking.build("off", tensorboard=False, terminal=False)) == []
    assert kinds(tracking.build("off", tensorboard=False, terminal=True)) == [TerminalTracker]
    assert kinds(tracking.build("offline", tensorboard=False, terminal=True)) == [WandbTracker, TerminalTracker]
    assert kinds(tracking.build("off", tensorboard=True, terminal=True)) == [TensorBoardTracker, TerminalTracker]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"dilate": 1, "seed": 3}, True), ({"dilate": 3, "seed": 3}, False), ({"seed": 3}, False)],
)
def test_the_baseline_is_recognised_by_its_fields(config, expected) -> None:
    assert RUN.is_baseline(config) is expected


def test_the_driver_imports_none_of_the_heavy_packages() -> None:
    code = "import sys, tuner.tracking; print(*({'wandb', 'ray', 'torch', 'optuna', 'numpy', 'tensorboardX'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
