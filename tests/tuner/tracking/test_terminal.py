"""The terminal: what the display says, and plain lines where there is no terminal."""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.logging import RichHandler

from tuner.tracking import RunInfo, TerminalTracker
from tuner.tracking.progress import duration, number

PARAMS = {"learning_rate": 0.012345678901234567, "delta_cls_loss": 0.1 + 0.2, "dilate": 3, "rule": "pr_curve"}
BASELINE = {"learning_rate": 1.0, "dilate": 1}


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def run_info(directory: Path, **changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "name": "cracks", "id": "3fa91c", "directory": directory, "space": {}, "baseline": BASELINE,
        "trials_asked": 10, "hours": None, "metric": "dice_mean", "mode": "max",
    }  # fmt: skip
    return RunInfo(**(values | changes))


def record(trial: int, status: str = "completed", **changes: Any) -> dict[str, Any]:
    values = {
        "trial": f"3fa91c-{trial:04d}", "params": PARAMS, "status": status, "reason": None, "value": 0.6 + 0.1,
        "best_epoch": 12, "epochs": 50, "seconds": 62.25, "baseline": False, "replayed_from": None,
    }  # fmt: skip
    return values | changes


def terminal(width: int = 80, height: int = 40) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, height=height, _environ={}
    )


def drawn(tracker: TerminalTracker, width: int = 80) -> str:
    """The display as text."""
    console = Console(file=io.StringIO(), width=width, _environ={})
    assert tracker._live is not None
    console.print(tracker._live.get_renderable())
    return console.file.getvalue()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(tmp_path, clock):
    tracker = TerminalTracker(terminal(), clock)
    tracker.search_started(run_info(tmp_path))
    yield tracker
    tracker.close()


def test_the_display_shows_the_whole_search(live, clock) -> None:
    live.trial_started("3fa91c-0000", BASELINE, BASELINE, [])
    for trial in range(1, 6):
        live.trial_started(f"3fa91c-{trial:04d}", PARAMS, PARAMS, [])
    live.epoch_ended("3fa91c-0000", {"epoch": 7, "value": 0.65432109876}, {}, {})
    live.epoch_ended("3fa91c-0000", {"epoch": 8, "value": 0.5}, {}, {})
    live.epoch_ended("3fa91c-0001", {"epoch": 3, "value": None}, {}, {})
    clock.seconds = 600
    live.trial_ended(record(2))
    live.trial_ended(record(3, "stopped_early", value=0.4))
    live.trial_ended(record(4, "diverged", value=None, reason="the loss is NaN"))
    live.trial_ended(record(5, "failed", value=None, epochs=0))
    text = drawn(live)
    header, counts, best = text.splitlines()[:3]
    assert header.split("  ") == ["cracks", "dice_mean (max)", "10 min 00 s elapsed, about 15 min 00 s left"]
    assert counts == ("4 of 10 trials: 2 running, 1 completed, 1 stopped early, 1 diverged, 1 failed")
    assert best.startswith("best: 0.7  3fa91c-0002  learning_rate=0.01235 delta_cls_loss=0.3")
    assert re.search(r"3fa91c-0000 baseline +8 +0\.5 +0\.6543 +1 +1 ", text)
    assert re.search(r"3fa91c-0001 +3 +- +- +0\.01235 +3 +0\.3 ", text)
    assert re.search(r"3fa91c-0003 +50 +0\.4 +stopped early +0\.01235 +0\.3 +3", text)
    assert re.search(r"3fa91c-0005 +- +- +failed", text)
    assert not re.search(r"\d\.\d{6}", text)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_display_fits_any_terminal(tmp_path, width) -> None:
    tracker = TerminalTracker(terminal(width, height=24))
    tracker.search_started(run_info(tmp_path, name="a" * 100))
    many = {f"a_rather_long_parameter_{i}": "value" * 20 for i in range(12)}
    for trial in range(64):
        tracker.trial_started(f"3fa91c-{trial:04d}", many, many, [])
        tracker.trial_ended(record(100 + trial, params=many, value=None))
    lines = drawn(tracker, width).splitlines()
    tracker.close()
    assert max(map(len, lines)) <= width
    shown = [line for line in lines if line.startswith("3fa91c-00")]
    assert f"and {64 - len(shown)} more" in "\n".join(lines)
    assert [line for line in lines if line.startswith("3fa91c-0163")]
    if width >= 80:
        assert len(lines) <= 24


@pytest.mark.parametrize(("mode", "best"), [("max", "3fa91c-0001"), ("min", "3fa91c-0002")])
def test_the_best_is_found_in_either_direction_and_never_among_the_diverged(tmp_path, mode, best) -> None:
    tracker = TerminalTracker(terminal())
    tracker.search_started(run_info(tmp_path, mode=mode))
    tracker.trial_ended(record(1, value=0.9))
    tracker.trial_ended(record(2, value=0.1))
    tracker.trial_ended(record(3, "diverged", value=0.95))
    tracker.trial_ended(record(4, "diverged", value=0.05))
    tracker.trial_ended(record(5, value=float("nan")))
    assert best in drawn(tracker).splitlines()[2]
    tracker.close()


def test_a_running_trial_can_be_the_best(live) -> None:
    live.trial_started("3fa91c-0000", BASELINE, BASELINE, [])
    assert "best: none yet" in drawn(live)
    live.epoch_ended("3fa91c-0000", {"epoch": 1, "value": 0.3}, {}, {})
    assert "best: 0.3  3fa91c-0000 (running) (baseline)" in drawn(live)


def test_two_objectives_are_shown_together(live) -> None:
    live.trial_ended(record(1, value=[0.71234, 12]))
    assert "best: 0.7123 / 12" in drawn(live)


def test_time_left_obeys_the_budget_in_hours(tmp_path, clock) -> None:
    tracker = TerminalTracker(terminal(), clock)
    tracker.search_started(run_info(tmp_path, hours=0.5))
    assert "about 30 min 00 s left" in drawn(tracker)
    clock.seconds = 1200
    tracker.trial_ended(record(1))
    assert "20 min 00 s elapsed, about 10 min 00 s left" in drawn(tracker)
    tracker.close()


def test_a_resumed_search_counts_what_finished_before(tmp_path, clock) -> None:
    lines = [json.dumps(record(n, started=100.0 * n, ended=100.0 * n + 62.25)) for n in range(3)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + '\n{"trial": "3fa91')
    tracker = TerminalTracker(terminal(), clock)
    tracker.search_started(run_info(tmp_path))
    text = drawn(tracker)
    assert "3 of 10 trials" in text
    assert "4 min 22 s elapsed" in text
    assert "left" not in text
    clock.seconds = 60
    tracker.trial_ended(record(3))
    tracker.trial_ended(record(4, replayed_from="3fa91c-0001"))
    text = " ".join(drawn(tracker).split())
    assert "4 of 10 trials: 0 running, 5 completed" in text
    assert "(1 replayed)" in text
    assert "about 6 min 00 s left" in text
    tracker.close()


def test_log_messages_and_prints_scroll_by_above_the_display(tmp_path) -> None:
    live = TerminalTracker(terminal())
    live.search_started(run_info(tmp_path))
    log = logging.getLogger("test_terminal")
    handler = RichHandler(console=live.console)
    log.addHandler(handler)
    log.warning("a node has left")
    log.removeHandler(handler)
    print("from elsewhere")
    live.search_ended("finished")
    output = live.console.file.getvalue()
    assert "a node has left" in output
    assert "from elsewhere" in output
    assert output.index("a node has left") < output.rindex("0 of 10 trials")
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor comes back
    assert output.rstrip().endswith("no trial has a value")


def test_a_trial_that_is_held_is_not_said_to_have_ended(tmp_path, clock) -> None:
    console = Console(file=io.StringIO(), width=80, _environ={})
    tracker = TerminalTracker(console, clock)
    tracker.search_started(run_info(tmp_path))
    for trial in (0, 1):
        tracker.trial_started(f"3fa91c-000{trial}", PARAMS, PARAMS, [])
        tracker.trial_held(record(trial, "stopped_early", value=0.1))
    tracker.trial_started("3fa91c-0000", PARAMS, PARAMS, [{"epoch": 1}])
    tracker.trial_ended(record(0, value=0.5))
    tracker.trial_ended(record(1, "stopped_early", value=0.1))  # the search is over; nothing new
    tracker.search_ended("finished")
    lines = console.file.getvalue().splitlines()
    assert [line.split(";")[0] for line in lines[:3]] == [
        "[1 of 10] 3fa91c-0000 held", "[2 of 10] 3fa91c-0001 held", "[2 of 10] 3fa91c-0000 completed",
    ]  # fmt: skip
    assert "1 completed, 1 stopped early" in lines[3]
    assert len(lines) == 4


def test_without_a_terminal_there_is_one_plain_line_a_trial_and_one_at_the_end(tmp_path, clock) -> None:
    console = Console(file=io.StringIO(), width=80, _environ={})
    tracker = TerminalTracker(console, clock)
    tracker.search_started(run_info(tmp_path, name="[red]cracks"))
    tracker.trial_started("3fa91c-0000", BASELINE, BASELINE, [])
    tracker.epoch_ended("3fa91c-0000", {"epoch": 1, "value": 0.5}, {}, {})
    tracker.trial_ended(record(0, params=BASELINE, baseline=True))
    tracker.trial_ended(record(1, "diverged", value=None, epochs=2, reason="the loss is NaN\nin step 3"))
    tracker.trial_ended(record(2, value=0.5, replayed_from="3fa91c-0000"))
    tracker.trial_started("3fa91c-0003", PARAMS, PARAMS, [])
    clock.seconds = 3 * 3600 + 20 * 60
    tracker.search_ended("stopped")
    output = console.file.getvalue()
    assert "\x1b" not in output
    searched = "learning_rate=0.01235 delta_cls_loss=0.3 dilate=3 rule=pr_curve"
    assert output.splitlines() == [
        "[1 of 10] 3fa91c-0000 (baseline) completed; dice_mean 0.7 at epoch 12; 50 epochs in 1 min 02 s; "
        "learning_rate=1 dilate=1",
        f"[2 of 10] 3fa91c-0001 diverged; 2 epochs in 1 min 02 s; {searched}; the loss is NaN in step 3",
        f"[2 of 10] 3fa91c-0002 completed; dice_mean 0.5 at epoch 12; 50 epochs in 1 min 02 s; {searched}; "
        "read off 3fa91c-0000",
        "search [red]cracks stopped after 3 h 20 min: 2 completed, 0 stopped early, 1 diverged, 0 failed, "
        "1 unfinished; best dice_mean 0.7 by 3fa91c-0000",
    ]


def test_events_before_the_search_are_refused() -> None:
    with pytest.raises(RuntimeError, match="the search has not started"):
        TerminalTracker(terminal()).trial_ended(record(1))
    TerminalTracker(terminal()).search_ended("failed")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.1 + 0.2, "0.3"), (1e-7 / 3, "3.333e-08"), (12345678, "12345678"), (True, "True"),
     ("grid", "grid"), ([0.5, None], "0.5 / -"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_are_short(value, text) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.9, "59 s"), (245, "4 min 05 s"), (12000, "3 h 20 min"), (200000, "2 d 7 h")],
)
def test_durations_have_two_units(seconds, text) -> None:
    assert duration(seconds) == text
