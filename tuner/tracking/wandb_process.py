"""The logger process: holds the W&B runs of all trials, fed with one JSON object a line on its standard input.

`tuner.tracking.wandb_runs` runs this file by its path, not as part of the package, so that the process imports the
standard library and wandb and nothing else. It ends when its input ends, which is also how it learns that the driver
has died, and finishes the runs that are open then as interrupted. Signals do not end it: a Ctrl-C or a node's SIGTERM
reaches the driver too, whose last events must still be written.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any, Literal

PROJECT = "segdec-tuner"
INIT_TIMEOUT_S = 30.0
"""Online: how long opening a run may take, unless WANDB_INIT_TIMEOUT says; the other trials' events wait meanwhile."""
FINISH_TIMEOUT_S = 60.0
"""Online: how long finishing a run may upload; what is left lies on disk for `wandb sync --include-online`."""
PARENT_CHECK_S = 1.0
MOST_OPEN = 64
"""So many runs may be open before those of trials that are held are put aside."""

EXIT_CODES = {"completed": 0, "stopped_early": 0, "diverged": 1, "failed": 1}
INTERRUPTED = 255
"""wandb's own exit code for a run cut off by Ctrl-C."""

LOGIN_MISSING = 3
"""Exit code of `--check-login` without usable credentials."""


def numbers(name: str, value: Any) -> dict[str, float]:
    """The finite numbers in a figure. None and NaN are left out: W&B would store a NaN as a string, and a chart
    cannot show either. The figures of two objectives get _1 and _2."""
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value, 1) for k, v in numbers(f"{name}_{i}", item).items()}
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return {}
    return {name: value}


def wandb_name(figure: str) -> str:
    """W&B's name of a figure of the history; the part before the slash becomes the chart's section."""
    if figure == "epoch":
        return figure
    if figure.startswith("loss_"):
        return "loss/" + figure.removeprefix("loss_")
    if figure == "seconds":
        return "time/seconds"
    return "val/" + ("objective" if figure == "value" else figure)


def history_row(figures: dict[str, Any]) -> dict[str, Any]:
    """A row of the history as W&B gets it."""
    return {k: v for name, value in figures.items() for k, v in numbers(wandb_name(name), value).items()}


class Runs:
    """The runs of a search, one open run a running trial."""

    def __init__(self, search: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._search = search
        self._mode: Literal["offline", "online"] = search["mode"]
        self._open: dict[str, Any] = {}
        self._best: dict[str, float] = {}
        self._next_step: dict[str, int] = {}
        """Offline, of trials that go on: W&B would count from 0 again, and `wandb sync` leaves steps as they are."""

    def trial_started(self, trial: str, config: dict[str, Any], baseline: bool, resumed_epoch: int) -> None:
        if trial in self._open:  # issued again after a node died; W&B refuses a second open run of one id
            return
        try:
            run = self._init(trial, trial, config, baseline, resumed_epoch)
        except self._wandb.errors.Error as error:
            if self._mode == "offline":
                raise
            # Nothing may be lost: from here on as if offline. The id that failed is still taken in this process.
            self._mode = "offline"
            reason = " ".join(str(error).split())
            kept = f"further trials are kept for `tuner sync {self._search['directory']}`"
            print(f"no way online, {kept}: {reason}", flush=True)
            run = self._init(trial, f"{trial}-offline", config, baseline, resumed_epoch)
        run.define_metric("*", step_metric="epoch")
        self._open[trial] = run
        if resumed_epoch:
            if self._mode == "offline":
                self._next_step[trial] = resumed_epoch
            # An earlier epoch may be better than all that follow: only the record knows.
            self._best[trial] = math.nan

    def _init(self, trial: str, run_id: str, config: dict[str, Any], baseline: bool, resumed_epoch: int) -> Any:
        online = self._mode == "online"
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=self._search["name"],
            job_type="trial",
            id=run_id,
            name=trial,
            tags=["baseline"] if baseline else None,
            dir=self._search["directory"],
            config=config,
            mode=self._mode,
            # Offline, W&B cannot look for an earlier run of this id: `tuner sync` joins them later.
            resume="allow" if online and resumed_epoch else None,
            reinit="create_new",
            settings=self._settings(online),
        )

    def _settings(self, online: bool) -> Any:
        """Quiet, and without the driver's load, hardware and packages, which say nothing about a trial's worker."""
        return self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT_S),
            finish_timeout=FINISH_TIMEOUT_S if online else 0.0,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )

    def epoch_ended(self, trial: str, figures: dict[str, Any], previews: dict[str, str]) -> None:
        run = self._open.get(trial)
        if run is None:  # a last report that arrived after the trial's end
            return
        row = history_row(figures)
        for name, png in previews.items():
            row[f"preview/{name}"] = self._image(base64.b64decode(png), f"epoch {figures.get('epoch')}")
        run.log(row, step=self._next_step.pop(trial, None), commit=True)
        self._keep_best(trial, figures)

    def _image(self, png: bytes, caption: str) -> Any:
        from PIL import Image

        return self._wandb.Image(Image.open(io.BytesIO(png)), caption=caption)

    def _keep_best(self, trial: str, figures: dict[str, Any]) -> None:
        """Scalars of our own: W&B's `summary="max"` would store an object, by which no table sorts."""
        value = numbers("value", figures.get("value")).get("value")
        if value is None:
            return
        sign = 1 if self._search["objective_mode"] == "max" else -1
        best = self._best.get(trial)
        if best is None or sign * value > sign * best:
            self._best[trial] = value
            self._open[trial].summary.update(
                numbers("best/value", value)
                | numbers("best/epoch", figures.get("epoch"))
                | numbers("best/threshold", figures.get("threshold"))
            )

    def trial_ended(self, record: dict[str, Any]) -> None:
        trial = record["trial"]
        if trial not in self._open:  # read off another trial's network, failed before it began, or held and put aside
            config = {**(record.get("config") or {}), **(record.get("params") or {})}
            is_replay = bool(record.get("replayed_from"))
            logged = 0 if is_replay else record.get("epochs") or 0
            self.trial_started(trial, config, bool(record.get("baseline")), resumed_epoch=logged)
            for figures in (record.get("history") or []) if is_replay else []:
                self.epoch_ended(trial, figures, {})
        thresholds = record.get("thresholds") or {}
        summary: dict[str, Any] = {"status": record["status"]}
        summary |= {name: record[name] for name in ("reason", "replayed_from") if record.get(name)}
        for name, value in (
            ("best/value", record.get("value")),
            ("best/values", record.get("values")),
            *((f"violation/{name}", by) for name, by in (record.get("violations") or {}).items()),
            ("best/epoch", record.get("best_epoch")),
            ("best/threshold", thresholds.get("segmentation_probability")),
            ("epochs", record.get("epochs")),
            ("seconds", record.get("seconds")),
            ("device_seconds", record.get("device_seconds")),
        ):
            summary |= numbers(name, value)
        self._finish(trial, summary, EXIT_CODES.get(record["status"], 1))

    def trial_held(self, trial: str) -> None:
        """A run may stay open until its trial goes on, but each holds a file."""
        if trial in self._open and len(self._open) > MOST_OPEN:
            self._finish(trial, {"status": "held"}, 0)

    def _finish(self, trial: str, summary: dict[str, Any], exit_code: int) -> None:
        run = self._open.pop(trial)
        self._best.pop(trial, None)
        self._next_step.pop(trial, None)
        run.summary.update(summary)
        run.tags = (*(run.tags or ()), summary["status"])
        run.finish(exit_code=exit_code)

    def close(self) -> None:
        """Finishes what is still open, so that the data of a search that was stopped survive."""
        for trial in tuple(self._open):
            self._finish(trial, {"status": "interrupted"}, INTERRUPTED)


def read_events(descriptor: int, parent: int) -> Iterator[dict[str, Any]]:
    """Events until the pipe ends or the parent is gone. A line cut off by the parent's death is dropped.

    The parent is watched too because a child that it forked may hold the pipe open.
    """
    rest = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], PARENT_CHECK_S)
        if not ready:
            if os.getppid() != parent:
                return
            continue
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(json.loads, lines)


def serve(parent: int) -> None:
    """Applies every event of the search; the first one describes the search itself."""
    descriptor = os.dup(0)  # not inherited, so that wandb-core does not hold the pipe open as its own input
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    events = read_events(descriptor, parent)
    search = next(events, None)
    if search is None:
        return
    runs = Runs(search)
    try:
        for event in events:
            getattr(runs, event.pop("event"))(**event)
    finally:
        runs.close()


def check_login() -> int:
    """Whether wandb finds credentials, by its own rules and without asking the network or the user."""
    import wandb

    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        print(error)
        return LOGIN_MISSING
    return 0 if found else LOGIN_MISSING


def main(arguments: list[str]) -> int:
    """`PARENT_PID` serves a search; `--check-login` looks for credentials."""
    if arguments == ["--check-login"]:
        return check_login()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    serve(int(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
