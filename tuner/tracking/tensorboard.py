"""TensorBoard: every trial a folder of event files, `RUN/tensorboard/TRIAL`.

An event file is a list of records, each with checksums of its length and of its content. An epoch is one record, so
that it is there whole or not at all, and on the disk before the next is written. What a trial's files hold already is
read back before anything is added: epochs that a killed driver did not live to write are filled in from the trial's
history, none is written twice, and nothing follows a record that was torn, for each session begins a file of its own.

tensorboardX brings the messages. Its writer does not do: a thread that has died, of a full disk say, would block
the search for ever. Files are open only while something is added.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner import records
from tuner.space import is_number
from tuner.tracking.base import RunInfo, Tracker
from tuner.tracking.names import chart_name, numbers

FOLDER = "tensorboard"

_START = "_hparams_/session_start_info"
_END = "_hparams_/session_end_info"
_EXPERIMENT = "_hparams_/experiment"
_STATUSES = {"completed": "STATUS_SUCCESS", "stopped_early": "STATUS_SUCCESS"}
"""TensorBoard's; all others are failures. It keeps the first end that it reads, and calls a trial without one unknown,
so one that is held or was interrupted has none."""


class TensorBoardTracker(Tracker):
    """Writes scalars and previews by epoch under W&B's names, and parameters and final figures for the HPARAMS tab."""

    name = "TensorBoard"

    def __init__(self) -> None:
        self._run: RunInfo | None = None
        self._trials: dict[str, _Files] = {}

    def search_started(self, run: RunInfo) -> None:
        self._run = run
        (run.directory / FOLDER).mkdir(exist_ok=True)

    def trial_started(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        self._files(trial).write(self._missing(trial, params, config, history))

    def epoch_ended(
        self, trial: str, figures: dict[str, float | None], use: dict[str, float], previews: dict[str, bytes]
    ) -> None:
        files = self._files(trial)
        if figures["epoch"] not in files.epochs:  # else its worker died and trained it again
            files.write([_epoch(figures, use, previews)])

    def trial_ended(self, record: dict[str, Any]) -> None:
        trial = record["trial"]
        files = self._files(trial)
        if not files.has_end:
            missing = self._missing(trial, record["params"], record["config"], record["history"])
            files.write([*missing, _end(record)])

    def search_ended(self, state: str) -> None:
        """Once all records are final, adds what was never told, because the driver was killed or a disk was full."""
        if state == "finished" and self._run:
            for record in records.read(self._run.directory):
                self.trial_ended(record)

    def _files(self, trial: str) -> _Files:
        if self._run is None:
            raise RuntimeError("the search has not started")
        if trial not in self._trials:
            self._trials[trial] = _Files(self._run.directory.resolve() / FOLDER / trial)
        return self._trials[trial]

    def _missing(
        self, trial: str, params: dict[str, Any], config: dict[str, Any], history: Iterable[dict[str, Any]]
    ) -> list[Any]:
        """Events that the files of a trial lack, of its start and the epochs that it has done."""
        assert self._run is not None
        files = self._files(trial)
        start = [] if files.has_start else [_start(self._run.space, {**config, **params})]
        return start + [_epoch(row, {}, {}) for row in history if row["epoch"] not in files.epochs]


class _Files:
    """The event files of a trial: what earlier sessions left, and that of this one, made with the first event."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Path | None = None
        self.epochs: set[int] = set()
        self.has_start = self.has_end = False
        self._earlier = sorted(folder.glob("*.tfevents.*"))
        for path in self._earlier:
            for event in read_events(path):
                self._take_in(event)

    def write(self, events: list[Any]) -> None:
        """Adds events; they are on the disk when it returns. OSError if they cannot be."""
        if not events:
            return
        is_new = self._file is None
        path = self._file = self._file or self._new()
        with path.open("xb" if is_new else "ab") as file:
            for event in [_event(file_version="brain.Event:2"), *events] if is_new else events:
                file.write(_framed(event.SerializeToString()))
            file.flush()
            os.fsync(file.fileno())
        for event in events:
            self._take_in(event)

    def _new(self) -> Path:
        """TensorBoard reads the files of a folder in the order of their names."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{len(self._earlier):04d}"
        return self._folder / name

    def _take_in(self, event: Any) -> None:
        tags = {value.tag for value in event.summary.value}
        self.has_start |= _START in tags
        self.has_end |= _END in tags
        if event.step:
            self.epochs.add(event.step)


def read_events(path: Path) -> Iterator[Any]:
    """The events of a file as far as it is whole: what a killed driver has torn lies at the end."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        content = data[start + 12 : end - 4]
        if struct.unpack_from("<I", data, end - 4)[0] != _checksum(content):
            return
        yield Event.FromString(content)
        start = end


def _framed(content: bytes) -> bytes:
    """A record of an event file."""
    length = struct.pack("<Q", len(content))
    checksums = (struct.pack("<I", _checksum(part)) for part in (length, content))
    return length + next(checksums) + content + next(checksums)


def _checksum(part: bytes) -> int:
    """The masked CRC-32C of TFRecord files. tensorboardX computes it in Python, 22 ms for an epoch's pictures."""
    import google_crc32c

    crc = google_crc32c.value(part)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _event(**fields: Any) -> Any:
    from tensorboardX.proto.event_pb2 import Event

    return Event(wall_time=time.time(), **fields)


def _epoch(figures: Mapping[str, Any], use: Mapping[str, float], previews: Mapping[str, bytes]) -> Any:
    """An epoch as one event."""
    from tensorboardX.proto.summary_pb2 import Summary

    named = {chart_name(name): value for name, value in figures.items() if name != "epoch"}
    values = _scalars(named | {f"use/{name}": value for name, value in use.items()})
    for name, png in previews.items():
        width, height = struct.unpack(">II", png[16:24])  # of its header
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        values.append(Summary.Value(tag=f"preview/{name}", image=image))
    return _event(step=figures["epoch"], summary=Summary(value=values))


def _scalars(named: Mapping[str, Any]) -> list[Any]:
    """Values of a summary; None, and what is no finite number, is left out."""
    from tensorboardX.proto.summary_pb2 import Summary

    return [
        Summary.Value(tag=name, simple_value=number)
        for given, value in named.items()
        for name, number in numbers(given, value).items()
    ]


def _start(space: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """What is searched, and which figures are compared; with it the parameters of a trial."""
    from tensorboardX.proto.api_pb2 import Experiment, HParamInfo, MetricInfo, MetricName
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo
    from tensorboardX.proto.summary_pb2 import Summary

    types = {name: _type(param) for name, param in space["search"].items()}
    metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in _compared_tags(space)]
    infos = [HParamInfo(name=name, type=kind) for name, kind in types.items()]
    experiment = HParamsPluginData(experiment=Experiment(hparam_infos=infos, metric_infos=metrics))
    start = SessionStartInfo(start_time_secs=time.time())
    for name, kind in types.items():
        value = config.get(name)
        if kind == "DATA_TYPE_STRING":
            start.hparams[name].string_value = str(value)
        elif kind == "DATA_TYPE_BOOL" and isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif kind == "DATA_TYPE_FLOAT64" and is_number(value):  # a baseline outside the space may have "all"
            start.hparams[name].number_value = value
    values = [_hparams(_EXPERIMENT, experiment), _hparams(_START, HParamsPluginData(session_start_info=start))]
    return _event(summary=Summary(value=values))


def _type(param: Mapping[str, Any]) -> str:
    """TensorBoard's type of a searched parameter, as a space describes it."""
    choices = param.get("choices", [0.0])
    if all(isinstance(choice, bool) for choice in choices):
        return "DATA_TYPE_BOOL"
    return "DATA_TYPE_FLOAT64" if all(map(is_number, choices)) else "DATA_TYPE_STRING"


def _compared_tags(space: Mapping[str, Any]) -> list[str]:
    """Scalars whose last values the HPARAMS tab shows: final figures, and where a running trial stands."""
    objectives = 2 if isinstance(space["objective"], list) else 1
    return [
        *("best/value", "val/objective"),
        *([f"best/values_{n}" for n in (1, 2)] if objectives == 2 else []),
        *(f"violation/{bound['metric']}" for bound in space.get("constraints", [])),
        *("best/epoch", "best/threshold", "total/epochs", "total/seconds", "total/device_seconds"),
    ]


def _end(record: Mapping[str, Any]) -> Any:
    """How a trial ended, and its final figures."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import text

    status = record["status"]
    figures = {
        "best/value": record.get("value"),
        "best/values": record.get("values"),
        **{f"violation/{name}": by for name, by in (record.get("violations") or {}).items()},
        "best/epoch": record.get("best_epoch"),
        "best/threshold": (record.get("thresholds") or {}).get("segmentation_probability"),
        "total/epochs": record.get("epochs"),
        "total/seconds": record.get("seconds"),
        "total/device_seconds": record.get("device_seconds"),
    }
    words = [f"**{status.replace('_', ' ')}**", *([record["reason"]] if record.get("reason") else [])]
    if record.get("baseline"):
        words.append("the baseline")
    if record.get("replayed_from"):
        words.append(f"read off the network of {record['replayed_from']}")
    end = SessionEndInfo(status=_STATUSES.get(status, "STATUS_FAILURE"), end_time_secs=time.time())
    values = [*_scalars(figures), *text("status", "; ".join(words)).value]
    values.append(_hparams(_END, HParamsPluginData(session_end_info=end)))
    return _event(step=record.get("epochs") or 0, summary=Summary(value=values))


def _hparams(tag: str, content: Any) -> Any:
    """A value that is all metadata, as TensorBoard's plugin of hyperparameters reads it."""
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
