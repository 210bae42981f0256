"""The study of a run in optuna-dashboard, on this machine's loopback address; it looks and never touches.

optuna-dashboard can delete studies, end trials and edit notes, and keeps its notes and artifacts in the study. So it is
not given the study but a view of it, which no method can write through, and the server answers GET and HEAD alone. The
view reads the journal, or the database, anew at each request, and adds what only the dashboard shows: the objectives'
names, a note on the run and on each trial, and the previews of a trial's newest checkpoint.

A page from elsewhere may have its own name resolve to the loopback address and then read this server as if it were its
own; so the server answers only those who asked for it by a name of this machine.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, BinaryIO, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from tuner import records
from tuner.run import Run
from tuner.storage import explained, open_to_read

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.ASCII | re.IGNORECASE)
"""Host headers of those who asked for this machine, also through a forwarded port."""

_READ_ONLY = "this page only shows the run; nothing in it can be changed here"
_ELSEWHERE = "this page must be opened as 127.0.0.1 or localhost"
_SHOWN_OF_A_RECORD = ("status", "reason", "value", "best_epoch", "epochs", "seconds", "replayed_from")
_INTERNAL = ("record", "held", "judged")


class View(BaseStorage):
    """One study of a run as the dashboard is to see it. ValueError if it is not there; TypeError for whoever writes."""

    def __init__(self, run: Run, study_name: str) -> None:
        self._run, self._name, self._where = run, study_name, run.study
        self._run_id: str = run.info["id"]
        self.previews: dict[str, Path] = {}
        """picture files by artifact id, of all trials that were looked at"""
        missing = ValueError(
            f"the study of {run.directory} must have begun to be shown, found none yet; `tuner resume {run.directory}` "
            "begins it"
        )
        if isinstance(self._where, Path) and not self._where.exists():  # which opening it would make
            raise missing
        with explained(self._where):
            self._source = open_to_read(self._where)
            try:
                self.study_id: int = self._source.get_study_id_from_name(study_name)
            except KeyError:
                raise missing from None

    def get_all_studies(self) -> list[FrozenStudy]:
        return [
            FrozenStudy(
                study_name=self._name,
                direction=None,
                directions=self.get_study_directions(self.study_id),
                user_attrs=self.get_study_user_attrs(self.study_id),
                system_attrs=self.get_study_system_attrs(self.study_id),
                study_id=self.study_id,
            )
        ]

    def get_study_id_from_name(self, study_name: str) -> int:
        if study_name != self._name:
            raise KeyError(study_name)
        return self.study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        self._check(study_id)
        return self._name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        self._check(study_id)
        return [StudyDirection[f"{objective.mode}imize".upper()] for objective in self._run.space.objectives]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Seconds that the search has used, and what a warm start brought."""
        found = self._study_attributes(study_id)
        return {key: found[key] for key in ("wall_seconds", "device_seconds", "warm_start") if key in found}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """The objectives' names, and all notes: optuna-dashboard looks for those of trials here too."""
        outside = records.joined(self._study_attributes(study_id), "baseline")
        found: dict[str, Any] = {
            "study:metric_names": [objective.metric for objective in self._run.space.objectives],
            **_note("dashboard", run_note(self._run, outside)),
        }
        for trial in self._trials():
            record = records.joined(trial.user_attrs, "record")
            if record:
                found |= _note(f"dashboard:{trial._trial_id}", trial_note(record, _is_held(trial)))
        return found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with explained(self._where):
            trial = self._source.get_trial(trial_id)
        return self._shown(trial, _previews(self._run.directory, self._trial(trial)))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        self._check(study_id)
        previews = _previews(self._run.directory, f"{self._run_id}-*")
        trials = (trial for trial in self._trials() if states is None or trial.state in states)
        return [self._shown(trial, previews) for trial in trials]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """As everywhere else: of those that meet the constraints, without those of a warm start. Where there is none
        the best that has completed, which is what optuna-dashboard takes it for."""
        self._check(study_id)
        complete = self.get_all_trials(study_id, states=(TrialState.COMPLETE,))
        can_win = [
            trial
            for trial in complete
            if "warm_start" not in trial.user_attrs and all(excess <= 0 for excess in trial.constraints.values())
        ]
        sign = 1 if self.get_study_directions(study_id)[0] is StudyDirection.MAXIMIZE else -1
        return max(can_win or complete, key=lambda trial: sign * trial.values[0])

    def _trials(self) -> list[FrozenTrial]:
        with explained(self._where):
            found: list[FrozenTrial] = self._source.get_all_trials(self.study_id, deepcopy=False)
        return found

    def _study_attributes(self, study_id: int) -> dict[str, Any]:
        self._check(study_id)
        with explained(self._where):
            found: dict[str, Any] = self._source.get_study_user_attrs(study_id)
        return found

    def _check(self, study_id: int) -> None:
        if study_id != self.study_id:  # a database may hold those of other runs
            raise KeyError(study_id)

    def _trial(self, trial: FrozenTrial) -> str:
        return records.trial_id(self._run_id, trial.number)

    def _shown(self, trial: FrozenTrial, previews: dict[str, list[Path]]) -> FrozenTrial:
        """A copy with the record in a few words, and with pictures; the whole record is too long for a page."""
        shown = copy.copy(trial)
        attributes = trial.user_attrs
        shown.user_attrs = {"trial": self._trial(trial)} | {
            key: value for key, value in attributes.items() if key not in _INTERNAL and not key.startswith("record-")
        }
        if record := records.joined(attributes, "record"):
            shown.user_attrs |= {key: record[key] for key in _SHOWN_OF_A_RECORD if record.get(key) is not None}
            threshold = (record["thresholds"] or {}).get("segmentation_probability")
            shown.user_attrs |= {} if threshold is None else {"threshold": threshold}
            shown.user_attrs |= {"status": "held"} if _is_held(trial) else {}
        pictures = {_artifact_id(path): path for path in previews.get(self._trial(trial), [])}
        self.previews |= pictures
        shown.system_attrs = (
            trial.system_attrs
            | {f"artifacts:{name}": _artifact(name, path) for name, path in pictures.items()}
            | ({"constraints": list(trial.constraints.values())} if trial.constraints else {})  # as it knows them
        )
        return shown

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(_READ_ONLY)

    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = set_trial_intermediate_value = _refuse
    set_trial_user_attr = set_trial_system_attr = _refuse


class _Previews:
    """optuna-dashboard's store of artifacts: the files where they lie."""

    def __init__(self, view: View) -> None:
        self._view = view

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from bottle import HTTPError

        try:
            return self._view.previews[artifact_id].open("rb")
        except (KeyError, FileNotFoundError):
            raise HTTPError(404, "a newer checkpoint has taken the place of this one") from None

    def write(self, artifact_id: str, content_body: BinaryIO) -> NoReturn:
        raise TypeError(_READ_ONLY)

    def remove(self, artifact_id: str) -> NoReturn:
        raise TypeError(_READ_ONLY)


class _Server(ThreadingMixIn, WSGIServer):
    """A browser holds connections open, so one thread would wait for the wrong one."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection of the dashboard broke", exc_info=True)


class _Handler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""


def server(run: Run, study_name: str, port: int) -> tuple[WSGIServer, str]:
    """A server that listens on the loopback address, and the URL of the study's page. Port 0 takes any free one.

    ValueError if the package is missing, the study is not there yet or the port is taken.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise ValueError(
            f"the package optuna-dashboard must be installed, found: {error}; pip install 'segdec-tuner[dashboard]'"
        ) from None
    view = View(run, study_name)
    app = _guarded(wsgi(view, artifact_store=_Previews(view)))
    try:
        made = make_server(HOST, port, app, server_class=_Server, handler_class=_Handler)
    except OSError as error:
        raise ValueError(
            f"the port must be a free one of {HOST}, found {port}: {error.strerror}; choose another with --port, "
            "0 takes any"
        ) from None
    return made, f"http://{HOST}:{made.server_port}/dashboard/studies/{view.study_id}"


def serve(run: Run, study_name: str, port: int) -> None:
    """Prints the URL, and serves it until Ctrl-C. ValueError as for `server`."""
    made, url = server(run, study_name, port)
    with made:
        print(url, flush=True)
        with suppress(KeyboardInterrupt):
            made.serve_forever()


def run_note(run: Run, outside: dict[str, Any] | None) -> str:
    """Markdown on a run; `outside` is the record of a baseline that is no point of the study."""
    space, info = run.space, run.info
    objectives = " and ".join(f"`{objective.metric}` ({objective.mode})" for objective in space.objectives)
    bounds = [f"{key} {value:g}" for key, value in info["space"]["budget"].items()]
    lines = [
        f"# {run.name}",
        f"{objectives} on validation of `{run.data}`; sampler {space.sampler}, scheduler {space.scheduler.name}; "
        f"budget: {', '.join(bounds).replace('_', ' ')}.",
        "Searched: " + ", ".join(f"`{name}`" for name in space.search) + ".",
        "Constraints: " + (", ".join(f"`{bound.metric}`" for bound in space.constraints) or "none") + ".",
        *([f"The baseline lies outside the space: {trial_note(outside, False)}"] if outside else []),
        "A trial that is *held* waits at a rung, and may go on. The best trial here is the luckiest; the winner is the "
        "one in the report.",
        "\n".join(
            f"- `tuner {verb} {run.directory}` {what}"
            for verb, what in (
                ("status", "says where it stands"),
                ("resume", "goes on after any stop"),
                ("report", "writes the report again"),
            )
        ),
        "This page is read-only: edits are refused.",
    ]
    return "\n\n".join(lines)


def trial_note(record: dict[str, Any], held: bool) -> str:
    """Markdown on a trial that has ended or is held."""
    lines = [f"**{'held' if held else record['status'].replace('_', ' ')}**"]
    if record["reason"]:
        lines[0] += f": {_plain(record['reason'])}"
    if record.get("replayed_from"):
        lines.append(f"- read off the network of `{record['replayed_from']}`")
    if record["value"] is not None:
        at = f"best epoch {record['best_epoch']} of {record['epochs']}"
        if "folds" in record:
            at = f"{record['epochs']} folds"
        lines.append(f"- {at}, value {record['value']:.4f}")
    if thresholds := record["thresholds"]:
        found = {
            "pixels": thresholds.get("segmentation_probability"),
            "decision": thresholds.get("decision_probability"),
        }
        values = [f"{name} {value:.4g}" for name, value in found.items() if value is not None]
        rule = f"- thresholds by `{thresholds['rule']}`, factor {thresholds['factor']}"
        lines.append(": ".join([rule, *([", ".join(values)] if values else [])]))
    lines.append(f"- {record['seconds']:.0f} s of training")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _plain(text: str) -> str:
    """Text of others, such as an exception's, that is to be no Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|!~" else letter for letter in " ".join(text.split()))


def _note(key: str, text: str) -> dict[str, Any]:
    """A note as optuna-dashboard keeps it."""
    return {f"{key}:note_ver": 1, f"{key}:note_str:0": text}


def _is_held(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("held")) and not trial.state.is_finished()


def _previews(directory: Path, trials: str) -> dict[str, list[Path]]:
    """The pictures of the newest checkpoint of each trial whose name matches; what lies on other machines is unseen."""
    folders: dict[str, tuple[float, Path]] = {}
    for pattern in {trials, f"{trials}.*"}:
        for folder in directory.glob(f"trials/attempt-*/{pattern}/checkpoint_*/previews"):
            name = folder.parents[1].name.split(".")[0]
            try:
                folders[name] = max(folders.get(name, (0.0, folder)), (folder.stat().st_mtime, folder))
            except FileNotFoundError:  # an old checkpoint that has just been removed
                continue
    return {name: sorted(folder.glob("*.png")) for name, (_, folder) in folders.items()}


def _artifact_id(path: Path) -> str:
    """Hexadecimal, and another one for each checkpoint, so that a browser keeps no old picture."""
    return hashlib.sha256(str(path).encode()).hexdigest()[:32]


def _artifact(name: str, path: Path) -> str:
    """What optuna-dashboard keeps of an artifact."""
    return json.dumps(
        {"artifact_id": name, "filename": f"preview-{path.name}", "mimetype": "image/png", "encoding": None}
    )


def _guarded(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The application for requests that only read; 405 for all others, 403 for those to another host."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not _HERE.fullmatch(environ.get("HTTP_HOST", "")):
            start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
            return [_ELSEWHERE.encode()]
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return app(environ, start_response)
        start_response("405 Method Not Allowed", [("Content-Type", "application/json"), ("Allow", "GET, HEAD")])
        return [json.dumps({"reason": _READ_ONLY}).encode()]

    return guarded
