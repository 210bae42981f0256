"""The W&B runs of all trials, as the logger process writes them; what is logged, and under which names."""

from __future__ import annotations

import base64
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from tuner.tracking.names import history_row, numbers
from tuner.tracking.wandb_files import (
    OFFLINE,
    PROJECT,
    Written,
    files_of,
    logged,
    lost_parts,
    mark,
    note_uploaded,
    report_run,
    uploaded,
    written,
)
from tuner.tracking.wandb_report import log_report
from tuner.tracking.wandb_runs import sync_command, without_password
from tuner.tracking.wandb_sweep import make_pages, sweep_of

INIT_TIMEOUT_S = 20.0
"""Online: how long opening a run may take, unless WANDB_INIT_TIMEOUT says; the other trials' events wait meanwhile."""
FINISH_TIMEOUT_S = 30.0
"""Online: how long finishing a run may upload, unless WANDB_FINISH_TIMEOUT says; what is left lies on disk."""
MOST_OPEN = 64
"""So many runs may be open before those of trials that are held are put aside."""

_LOOKS, _SECONDS_BETWEEN_LOOKS = 20, 0.1

EXIT_CODES = {"completed": 0, "stopped_early": 0, "diverged": 1, "failed": 1}
INTERRUPTED = 255
"""wandb's own exit code for a run cut off by Ctrl-C."""
_STATES = {*EXIT_CODES, "held", "interrupted"}
"""what a run is tagged with, one at a time"""


class Runs:
    """The runs of a search, one open run a running trial."""

    def __init__(self, search: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._search = search
        self._directory = Path(search["directory"])
        self._mode: Literal["offline", "online"] = search["mode"]
        self._open: dict[str, Any] = {}
        self._logged: dict[str, int] = {}
        """the last epoch that the run of an open trial holds, in files of earlier sessions too"""
        self._best: dict[str, dict[str, Any]] = {}
        """the figures of the best epoch of an open trial"""
        self._torn: list[str] = []
        self._not_uploaded: list[str] = []
        self._sweep: str | None = search["sweep"] or self._registered()

    def _registered(self) -> str | None:
        """The id of the sweep that a server has made for this search, now or in an earlier session."""
        found = sweep_of(self._directory)
        if self._mode == "online" and self._search["space"]:
            found = make_pages(self._directory, self._search["space"], self._search["data"], self._search["name"])
            if found["problems"]:
                what = "; ".join(found["problems"])
                _say(f"sweep page, workspace or report are missing until `{sync_command(self._directory)}`: {what}")
        return (found.get("sweep") or {}).get("id")

    def trial_started(self, trial: str, config: dict[str, Any], baseline: bool, history: list[dict[str, Any]]) -> None:
        if trial not in self._open:  # else issued again after a node died; W&B refuses a second open run of one id
            run_id = self._search["wandb_run"] or trial
            before = [part.epoch for part in logged(self._directory, run_id)]
            run = self._begin("trial", trial, run_id, config, baseline)
            run.define_metric("*", step_metric="epoch")
            self._open[trial] = run
            self._logged[trial] = max(before, default=0)
        for figures in history:
            self._log(trial, figures, {}, {})

    def _begin(self, job_type: str, name: str, run_id: str, config: dict[str, Any], baseline: bool) -> Any:
        files = files_of(self._directory, run_id)
        if not all(mark(file).exists() for file in files):
            # Its rows and its end would come to the server after those of this part, and so would be its last word.
            own_id = run_id + OFFLINE if self._search["mode"] == "online" else run_id
            return self._init("offline", job_type, name, own_id, config, baseline)
        goes_on = bool(files) or run_id in uploaded(self._directory)
        try:
            return self._init(self._mode, job_type, name, run_id, config, baseline, goes_on)
        except self._wandb.errors.Error as error:
            if self._mode == "offline":
                raise
            # Nothing may be lost: from here on as if offline. The id that failed is still taken in this process.
            self._mode = "offline"
            reason = " ".join(str(error).split())
            _say(f"no way online, so from here on W&B is kept for `{sync_command(self._directory)}`: {reason}")
            return self._init("offline", job_type, name, run_id + OFFLINE, config, baseline)

    def _init(
        self,
        mode: Literal["offline", "online"],
        job_type: str,
        name: str,
        run_id: str,
        config: dict[str, Any],
        baseline: bool,
        goes_on: bool = False,
    ) -> Any:
        online = mode == "online"
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=self._search["name"],
            job_type=job_type,
            id=run_id,
            name=name,
            tags=["baseline"] if baseline else None,
            dir=self._search["directory"],
            config=config,
            mode=mode,
            # Offline, W&B cannot look for an earlier run of this id: `tuner sync` joins them later.
            resume="allow" if online and goes_on else None,
            reinit="create_new",
            settings=self._settings(online, job_type),
        )

    def _settings(self, online: bool, job_type: str) -> Any:
        """Quiet, and without the driver's load, hardware and packages, which say nothing about a trial's worker."""
        return self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT_S),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_TIMEOUT_S) if online else 0.0,
            sweep_id=self._sweep if job_type == "trial" else None,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )

    def epoch_ended(self, trial: str, figures: dict[str, Any], use: dict[str, float], previews: dict[str, str]) -> None:
        if trial in self._open:  # else a last report that arrived after the trial's end
            self._log(trial, figures, use, previews)

    def _log(self, trial: str, figures: dict[str, Any], use: dict[str, float], previews: dict[str, str]) -> None:
        """A row, unless the run has it; the best so far is known from all of them."""
        best = self._best.get(trial)
        if "fold_value" in figures or is_better(figures, best, self._search["objective_mode"]):  # a mean so far
            best = self._best[trial] = figures
        epoch = figures["epoch"]
        if epoch <= self._logged[trial]:
            return
        row = history_row(figures)
        for name, value in use.items():
            row |= numbers(f"use/{name}", value)
        # Scalars of our own: W&B's `summary="max"` would store an object, by which no table sorts.
        for name in ("value", "epoch", "threshold"):
            row |= numbers(f"best/{name}", best.get(name) if best else None)
        # wandb copies files as they are; what it is given as a picture it would encode anew.
        with tempfile.TemporaryDirectory(prefix="segdec-previews-") if previews else nullcontext("") as folder:
            for n, (name, png) in enumerate(previews.items()):
                file = Path(folder) / f"{n}.png"
                file.write_bytes(base64.b64decode(png))
                row[f"preview/{name}"] = self._wandb.Image(str(file), caption=f"epoch {epoch}")
            self._open[trial].log(row, step=epoch, commit=True)
        self._logged[trial] = epoch

    def trial_ended(self, record: dict[str, Any]) -> None:
        trial = record["trial"]
        if trial not in self._open:  # read off another trial's network, failed before it began, or held and put aside
            config = {**(record.get("config") or {}), **(record.get("params") or {})}
            self.trial_started(trial, config, bool(record.get("baseline")), [])
        for figures in record.get("history") or []:
            self._log(trial, figures, {}, {})
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
            self._finish(trial, {"status": "held"}, INTERRUPTED)

    def _finish(self, trial: str, summary: dict[str, Any], exit_code: int) -> None:
        run = self._open.pop(trial)
        self._best.pop(trial, None)
        run.summary.update(summary)
        run.tags = (*(tag for tag in run.tags or () if tag not in _STATES), summary["status"])
        self._end(run, trial, exit_code, self._logged.pop(trial))

    def _end(self, run: Any, name: str, exit_code: int, epoch: int) -> None:
        """Finishes a run, and sees whether all of it is where it should be."""
        file = Path(run.dir).parent / f"run-{run.id}.wandb"
        online = not run.offline
        run.finish(exit_code=exit_code)
        found = _settled(file)
        if found.exit_code is None or 0 < found.epoch < epoch:
            self._torn.append(name)
        elif online and lost_parts(file.parent / "logs" / "debug-internal.log"):
            self._not_uploaded.append(name)
        elif online:
            mark(file).touch()  # which wandb itself only does where it uploads later
            note_uploaded(self._directory, run.id, found)
        elif self._mode == "online":
            self._not_uploaded.append(name)

    def report(self) -> None:
        """Logs the report that is written, as a run of its own."""
        run_id = report_run(self._search["id"])
        run = self._begin("report", "report", run_id, {}, False)
        log_report(self._wandb, run, self._search["name"], self._directory)
        self._end(run, "report", 0, 0)

    def close(self) -> None:
        """Finishes what is still open, so that the data of a search that was stopped survive; says what is lost."""
        for trial in tuple(self._open):
            self._finish(trial, {"status": "interrupted"}, INTERRUPTED)
        for trials, what in (
            (self._torn, "not wholly written (is the disk full?)"),
            (self._not_uploaded, "not wholly uploaded"),
        ):
            if trials:
                more = f" and {len(trials) - 3} more" if len(trials) > 3 else ""
                runs = ", ".join(trials[:3]) + more
                way_back = f"nothing is lost for good: `{sync_command(self._directory)}` makes them whole"
                if self._search["shared"]:  # nobody knows which run an agent's trial has
                    way_back = f"the records are whole, and `{sync_command(self._directory)}` uploads what there is"
                _say(f"{what}: {runs}; {way_back}")


def _say(text: str) -> None:
    """For the log of the process, a file that others may read."""
    print(without_password(text), flush=True)


def _settled(file: Path) -> Written:
    """What a file holds whose run was finished: online, wandb comes back before it has written the end."""
    for _ in range(_LOOKS):
        found = written(file)
        if found.exit_code is not None:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return found


def is_better(figures: dict[str, Any], than: dict[str, Any] | None, mode: str) -> bool:
    """Whether an epoch's objective is better than that of another one; without an objective it never is."""
    value = numbers("value", figures.get("value")).get("value")
    if value is None or than is None:
        return value is not None
    return value > than["value"] if mode == "max" else value < than["value"]
