"""Event files, read back with TensorBoard itself."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams

from tests.tuner.conftest import small_space
from tuner import records
from tuner.tracking import RunInfo, TensorBoardTracker, Tracker

TRIAL = "abc123-0001"
PARAMS = {"learning_rate": 0.25, "threshold_rule": "grid"}
SEARCH = {
    "learning_rate": {"type": "float", "low": 0.1, "high": 2.0},
    "dilate": {"type": "int", "low": 1, "high": 5, "step": 2},
    "threshold_rule": {"type": "categorical", "choices": ["pr_curve", "grid"]},
    "dynamic_balance": {"type": "categorical", "choices": [True, False]},
    "num_segmented": {"type": "categorical", "choices": [4, "all"]},
    "threshold_factor": {"type": "categorical", "choices": [1, 2]},
}


@pytest.fixture
def info(tmp_path: Path) -> RunInfo:
    return RunInfo("small", "abc123", tmp_path, small_space().to_dict(), None, 4, None, "dice_mean", "max")


def session(info: RunInfo) -> TensorBoardTracker:
    """The tracker of a search that begins, or goes on."""
    tracker = TensorBoardTracker()
    tracker.search_started(info)
    return tracker


def config(**changes: Any) -> dict[str, Any]:
    return small_space().config(PARAMS, 0).to_dict() | changes


def row(epoch: int) -> dict[str, Any]:
    """A row of a history."""
    return {
        "epoch": epoch, "loss_segmentation": 1 / epoch, "value": epoch / 8, "dice_mean": epoch / 8,
        "decision_ap": None,
    }  # fmt: skip


def rows(last: int) -> list[dict[str, Any]]:
    return [row(epoch) for epoch in range(1, last + 1)]


def start(tracker: Tracker, history: int = 0, trial: str = TRIAL) -> None:
    tracker.trial_started(trial, PARAMS, config(), rows(history))


def epochs(tracker: Tracker, *numbers: int, **previews: bytes) -> None:
    for epoch in numbers:
        figures = row(epoch) | {"two_pixel_f1": math.nan}
        tracker.epoch_ended(TRIAL, figures, {"cpu_percent": 50.0 + epoch, "memory_mib": 400.0}, previews)


def record(status: str = "completed", epochs: int = 3, **changes: Any) -> dict[str, Any]:
    """A line of records.jsonl."""
    return {
        "trial": TRIAL, "status": status, "reason": None, "value": 0.375, "best_epoch": 3, "epochs": epochs,
        "started": 0.0, "ended": 9.0, "seconds": 7.5, "device_seconds": 15.0, "baseline": False, "replayed_from": None,
        "thresholds": {"segmentation_probability": 0.25}, "params": PARAMS, "config": config(), "history": rows(epochs),
    } | changes  # fmt: skip


def png(side: int = 8) -> bytes:
    """Noise, which does not shrink."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (2 * side, side), os.urandom(6 * side**2)).save(stream, "png")
    return stream.getvalue()


def files(info: RunInfo, trial: str = TRIAL) -> list[Path]:
    return sorted((info.directory / "tensorboard" / trial).iterdir())


def read(info: RunInfo, trial: str = TRIAL) -> EventAccumulator:
    """All that TensorBoard finds in a trial's folder."""
    found = EventAccumulator(str(info.directory / "tensorboard" / trial), size_guidance=dict.fromkeys(
        ("scalars", "images", "tensors"), 0))  # fmt: skip
    return found.Reload()


def steps(info: RunInfo, tag: str = "val/objective", trial: str = TRIAL) -> list[int]:
    return [event.step for event in read(info, trial).Scalars(tag)]


def curve(info: RunInfo, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(info).Scalars(tag)]


def content(found: EventAccumulator, kind: str) -> bytes:
    return found.SummaryMetadata(f"_hparams_/{kind}").plugin_data.content


def ending(info: RunInfo, trial: str = TRIAL) -> tuple[str, str] | None:
    """TensorBoard's status of a trial, and what is said in words; None while it has not ended."""
    found = read(info, trial)
    if "_hparams_/session_end_info" not in found.summary_metadata:
        return None
    (said,) = found.Tensors("status/text_summary")
    status = hparams.parse_session_end_info_plugin_data(content(found, "session_end_info")).status
    return api_pb2.Status.Name(status), said.tensor_proto.string_val[0].decode()


def test_a_trial_can_be_read_back(info) -> None:
    tracker = session(info)
    start(tracker)
    pictures = [png(), png()]
    epochs(tracker, 1)
    epochs(tracker, 2, crack_7=pictures[0])
    epochs(tracker, 3, crack_7=pictures[1])
    assert ending(info) is None
    tracker.trial_ended(record(violations={"recall": 0.5}))
    found = read(info)
    by_epoch = {
        "loss/segmentation",
        "val/objective",
        "val/dice_mean",
        "use/cpu_percent",
        "use/memory_mib",
    }
    once = {
        "best/value",
        "best/epoch",
        "best/threshold",
        "violation/recall",
        "total/epochs",
        "total/seconds",
        "total/device_seconds",
    }
    assert set(found.Tags()["scalars"]) == by_epoch | once
    assert found.file_version == 2.0
    for tag in by_epoch:
        assert steps(info, tag) == [1, 2, 3]
    assert curve(info, "val/objective") == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert curve(info, "use/cpu_percent") == [(1, 51.0), (2, 52.0), (3, 53.0)]
    assert [curve(info, tag) for tag in ("best/value", "total/device_seconds", "violation/recall")] == [
        [(3, 0.375)], [(3, 15.0)], [(3, 0.5)]]  # fmt: skip
    shown = found.Images("preview/crack_7")
    assert [(image.step, image.encoded_image_string) for image in shown] == [(2, pictures[0]), (3, pictures[1])]
    assert (shown[0].width, shown[0].height) == Image.open(io.BytesIO(pictures[0])).size == (16, 8)
    assert ending(info) == ("STATUS_SUCCESS", "**completed**")


def test_parameters_are_those_that_are_searched(info) -> None:
    space = small_space(search=SEARCH, objective=[{"metric": "dice_mean"}, {"metric": "device_seconds"}],
                        constraints=[{"metric": "recall", "min": 0.5}])  # fmt: skip
    info = RunInfo("small", "abc123", info.directory, space.to_dict(), None, 4, None, "dice_mean", "max")
    tracker = session(info)
    params = {"learning_rate": 0.25, "dilate": 3, "dynamic_balance": False, "num_segmented": 4, "threshold_factor": 2}
    tracker.trial_started(TRIAL, params, config(threshold_rule="pr_curve"), [])
    found = read(info)
    experiment = hparams.parse_experiment_plugin_data(content(found, "experiment"))
    kinds = {one.name: api_pb2.DataType.Name(one.type).removeprefix("DATA_TYPE_") for one in experiment.hparam_infos}
    assert kinds == {
        "learning_rate": "FLOAT64", "dilate": "FLOAT64", "threshold_rule": "STRING", "dynamic_balance": "BOOL",
        "num_segmented": "STRING", "threshold_factor": "FLOAT64",
    }  # fmt: skip
    assert [one.name.tag for one in experiment.metric_infos] == [
        "best/value", "val/objective", "best/values_1", "best/values_2", "violation/recall", "best/epoch",
        "best/threshold", "total/epochs", "total/seconds", "total/device_seconds",
    ]  # fmt: skip
    begun = hparams.parse_session_start_info_plugin_data(content(found, "session_start_info"))
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in begun.hparams.items()}
    assert values == params | {"num_segmented": "4", "threshold_rule": "pr_curve"}  # a fixed one is the config's


def test_a_baseline_may_lie_outside_the_space(info) -> None:
    """It has all masks, where the search is for a number of them."""
    search = {"num_segmented": {"type": "int", "low": 4, "high": 8}}
    space = small_space(search=search).to_dict()
    tracker = session(RunInfo("small", "abc123", info.directory, space, None, 4, None, "dice_mean", "max"))
    tracker.trial_ended(record(params={}, baseline=True))
    begun = hparams.parse_session_start_info_plugin_data(content(read(info), "session_start_info"))
    assert dict(begun.hparams) == {}
    assert ending(info) == ("STATUS_SUCCESS", "**completed**; the baseline")


@pytest.mark.parametrize(
    ("status", "shown", "words"),
    [
        ("stopped_early", "STATUS_SUCCESS", "**stopped early**; because"),
        ("diverged", "STATUS_FAILURE", "**diverged**; because"),
        ("failed", "STATUS_FAILURE", "**failed**; because"),
    ],
)
def test_a_trial_ends_in_its_own_way(info, status: str, shown: str, words: str) -> None:
    tracker = session(info)
    start(tracker)
    tracker.trial_ended(record(status, epochs=0, reason="because", value=None, best_epoch=None, thresholds=None))
    assert ending(info) == (shown, words)
    assert "best/value" not in read(info).Tags()["scalars"]


def test_a_replay_is_written_at_its_end(info) -> None:
    tracker = session(info)
    tracker.trial_ended(record(replayed_from="abc123-0000"))
    assert steps(info) == [1, 2, 3]
    assert ending(info) == ("STATUS_SUCCESS", "**completed**; read off the network of abc123-0000")
    begun = hparams.parse_session_start_info_plugin_data(content(read(info), "session_start_info"))
    assert begun.hparams["learning_rate"].number_value == 0.25


def test_a_trial_that_became_a_replay_keeps_its_own_epochs(info) -> None:
    tracker = session(info)
    start(tracker)
    epochs(tracker, 1)
    tracker.trial_ended(record(replayed_from="abc123-0000"))
    assert steps(info) == [1, 2, 3]
    assert steps(info, "use/cpu_percent") == [1]


def test_epochs_that_a_killed_driver_did_not_write_are_filled_in(info) -> None:
    first = session(info)
    start(first)
    epochs(first, 1)
    second = session(info)  # in the same second
    start(second, history=3)
    epochs(second, 4)
    second.trial_ended(record(epochs=4))
    assert steps(info) == [1, 2, 3, 4]
    assert curve(info, "use/cpu_percent") == [(1, 51.0), (4, 54.0)]
    assert len(files(info)) == 2


def test_a_resumed_trial_is_not_begun_again(info) -> None:
    for history in (0, 1, 1):
        tracker = session(info)
        start(tracker, history)
        epochs(tracker, 1)
    assert steps(info) == [1]
    assert len(files(info)) == 1  # the later sessions had nothing to add


@pytest.mark.parametrize("in_one_session", [True, False])
def test_a_held_trial_goes_on(info, in_one_session: bool) -> None:
    tracker = session(info)
    start(tracker)
    epochs(tracker, 1, 2)
    tracker.trial_held(record("stopped_early", epochs=2))
    assert ending(info) is None
    tracker = tracker if in_one_session else session(info)
    start(tracker, history=2)
    epochs(tracker, 3)
    tracker.trial_ended(record())
    assert steps(info) == [1, 2, 3]
    assert ending(info) == ("STATUS_SUCCESS", "**completed**")


def test_a_held_trial_that_goes_on_no_more_ends_with_its_search(info) -> None:
    first = session(info)
    start(first)
    epochs(first, 1, 2)
    first.trial_held(record("stopped_early", epochs=2))
    session(info).trial_ended(record("stopped_early", epochs=2, reason="held at epoch 2"))
    assert steps(info) == [1, 2]
    assert ending(info) == ("STATUS_SUCCESS", "**stopped early**; held at epoch 2")


def test_an_epoch_that_a_second_worker_trained_again_is_there_once(info) -> None:
    tracker = session(info)
    start(tracker)
    epochs(tracker, 1, 2)
    start(tracker, history=1)
    epochs(tracker, 2, 3)
    assert steps(info) == [1, 2, 3]


@pytest.mark.parametrize("picture", [None, 4, 200], ids=["figures", "with a picture", "with a long one"])
@pytest.mark.parametrize("lost", [1, 4, 5, 50, "all but one", "blank", "all blank"])
def test_a_torn_record_is_written_again(info, picture: int | None, lost: int | str) -> None:
    first = session(info)
    start(first)
    epochs(first, 1, 2)
    (file,) = files(info)
    whole = file.stat().st_size
    epochs(first, 3, **({"crack": png(picture)} if picture else {}))
    size = file.stat().st_size
    with file.open("r+b") as torn:
        if lost in ("blank", "all blank"):  # after a power cut: the size was noted, and the content was not
            torn.seek(whole + (12 if lost == "blank" else 0))
            torn.write(b"\0" * (size - torn.tell()))
        else:
            torn.truncate(whole + 1 if lost == "all but one" else size - lost)
    assert steps(info) == [1, 2]
    second = session(info)
    start(second, history=4)
    epochs(second, 5)
    assert steps(info) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kept", [0, 1, 30, 60])
def test_a_start_that_was_torn_is_written_again(info, kept: int) -> None:
    start(session(info))
    (file,) = files(info)
    with file.open("r+b") as torn:
        torn.truncate(kept)
    tracker = session(info)
    start(tracker)
    epochs(tracker, 1)
    assert steps(info) == [1]
    assert content(read(info), "session_start_info")


def test_epochs_behind_a_long_record_are_found(info) -> None:
    first = session(info)
    start(first)
    epochs(first, 1, crack=png(200))
    epochs(first, 2)
    start(session(info), history=2)
    assert steps(info) == [1, 2]


def test_what_was_never_told_is_added_when_the_search_is_finished(info) -> None:
    """The driver was killed between the study and its trackers, or a disk was full."""
    first = session(info)
    start(first)
    epochs(first, 1)
    done = record(trial="abc123-0000", reason="told")
    first.trial_ended(done)
    records.RecordsFile(info.directory).write([done | {"reason": "not told again"}, record()])
    for state in ("stopped", "failed"):  # its record may be that of a held one
        session(info).search_ended(state)
        assert ending(info) is None
    second = session(info)
    second.search_ended("finished")
    assert ending(info) == ("STATUS_SUCCESS", "**completed**")
    assert steps(info) == [1, 2, 3]
    assert ending(info, "abc123-0000") == ("STATUS_SUCCESS", "**completed**; told")
    assert steps(info, "best/value", "abc123-0000") == [3]


def test_no_file_stays_open(info) -> None:
    tracker = session(info)
    start(tracker)
    before = list(Path("/proc/self/fd").iterdir())
    for number in range(20):
        start(tracker, trial=f"abc123-{number:04d}")
    assert list(Path("/proc/self/fd").iterdir()) == before


def test_events_before_the_search_are_refused(info) -> None:
    with pytest.raises(RuntimeError, match="the search has not started"):
        start(TensorBoardTracker())


FULL = """
import logging, resource, sys
from pathlib import Path
from tests.tuner.tracking.test_tensorboard import epochs, png, record, start
from tests.tuner.conftest import small_space
from tuner.tracking import RunInfo, TensorBoardTracker, Tracker, Trackers

class Others(Tracker):
    def epoch_ended(self, trial, figures, use, previews): print(figures["epoch"])
    def trial_ended(self, record): print("ended")

logging.basicConfig(level=logging.WARNING)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
trackers = Trackers([TensorBoardTracker(), Others()])
space = small_space().to_dict()
trackers.search_started(RunInfo("small", "abc123", Path(sys.argv[1]), space, None, 4, None, "dice_mean", "max"))
start(trackers)
epochs(trackers, 1)
epochs(trackers, 2, crack=png(100))
epochs(trackers, 3)
trackers.trial_ended(record())
trackers.search_ended("finished")
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_file_that_cannot_grow_is_one_warning(info) -> None:
    """A limit that the kernel enforces, as it does the size of a disk."""
    done = subprocess.run([sys.executable, "-c", FULL, str(info.directory)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "3", "ended"]
    assert done.stderr == (
        "WARNING:tuner.tracking.base:TensorBoard is switched off, for it failed (OSError: [Errno 27] File too large); "
        "the search goes on\n"
    )
    assert files(info)[0].stat().st_size == 20_000
    assert steps(info) == [1]
    second = session(info)  # there is room again
    second.trial_ended(record())
    assert steps(info) == [1, 2, 3]
    assert ending(info) == ("STATUS_SUCCESS", "**completed**")


SEARCH_ON_A_FULL_DISK = """
import logging, resource, sys
from dataclasses import dataclass
from pathlib import Path
from tests.tuner import test_search
from tests.tuner.tracking.test_tensorboard import png
from tuner.cluster import connected
from tuner.tracking import RunInfo, TensorBoardTracker

class Drawing(test_search.ScriptedTask):
    def run(self, config, device, resume, report):
        def drawn(progress, folder):
            (folder / "previews").mkdir(exist_ok=True)
            (folder / "previews/0.png").write_bytes(png(1000))
            test_search.checkpoint.seal(folder)
            report(progress, folder)
        super().run(config, device, resume, drawn)

test_search.ScriptedTask = Drawing
folder = Path(sys.argv[1])
space = test_search.scripted_space([1.0, 2.0])
tracker = TensorBoardTracker()
tracker.search_started(RunInfo("small", "abc123", folder, space.to_dict(), None, 3, None, "dice_mean", "max"))
logging.basicConfig(level=logging.WARNING)
with connected(None):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # of this process, not of those that Ray started
    print(test_search.run(space, folder, tracker=tracker))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_search_goes_on_where_its_event_files_cannot(info) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEARCH_ON_A_FULL_DISK, str(info.directory)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    warnings = [line for line in done.stderr.splitlines() if "tuner.tracking" in line]
    assert warnings == [
        "WARNING:tuner.tracking.base:TensorBoard is switched off, for it failed (OSError: [Errno 27] File too large); "
        "the search goes on"
    ]
    found = records.read(info.directory)
    assert [record["status"] for record in found] == ["completed"] * 3
    session(info).search_ended("finished")  # as after a resume with room
    for one in found:
        assert steps(info, trial=one["trial"]) == [1, 2, 3, 4]


def asked(url: str, body: dict[str, Any] | None = None) -> Any:
    assert url.startswith("http://127.0.0.1:")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_tensorboard_serves_them(info) -> None:
    """With its own loader, which is another one than the class that these tests read with."""
    tracker = session(info)
    start(tracker)
    epochs(tracker, 1, 2, crack=png())
    tracker.trial_ended(record(epochs=2))
    start(tracker, trial="abc123-0002", history=1)
    log = info.directory / "log.txt"
    command = [Path(sys.executable).parent / "tensorboard", "--logdir", info.directory / "tensorboard",
               "--host", "127.0.0.1", "--port", "0"]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "http://" in line)
        url = line.split(" at ")[1].split("/ ")[0]
        asking = {"allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN"], "startIndex": 0, "sliceSize": 9}
        while len(groups := asked(f"{url}/data/plugin/hparams/session_groups", asking)["sessionGroups"]) < 2:
            pass  # it loads while it serves
        ended, open_one = sorted(groups, key=lambda group: group["name"])
        assert (ended["name"], ended["hparams"]) == (TRIAL, PARAMS)
        assert [one["status"] for group in (ended, open_one) for one in group["sessions"]] == [
            "STATUS_SUCCESS",
            "STATUS_UNKNOWN",
        ]
        values = {one["name"]["tag"]: one["value"] for one in ended["metricValues"]}
        assert values["best/value"] == 0.375
        scalars = asked(f"{url}/data/plugin/scalars/scalars?run={TRIAL}&tag=val/objective")
        assert [(step, value) for _, step, value in scalars] == [(1, 0.125), (2, 0.25)]
        assert list(asked(f"{url}/data/plugin/images/tags")[TRIAL]) == ["preview/crack"]
        (said,) = asked(f"{url}/data/plugin/text/text?run={TRIAL}&tag=status/text_summary")
        assert "<strong>completed</strong>" in said["text"]
    finally:
        process.terminate()
        process.communicate()
