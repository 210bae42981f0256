"""A run and its directory (docs/run-directory.md): how it is made, opened again, and driven from search to report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from model import folds, layouts, splits, splits_file
from model.files import write_json
from model.sample import Sample
from model.splits import Splits
from tuner import datasets, records, selection, space_file
from tuner.datasets import SYNTHETIC, Source
from tuner.options import Options, study_url
from tuner.selection import Selection
from tuner.space import (
    CONSTRAINED_DECISION_METRICS,
    DECISION_METRICS,
    NAME_RULE,
    Repeats,
    Space,
    fingerprint_of,
    is_name,
)

SEARCH, TRIALS = "search", "trials"
"""What a run is: a search, or a collection of trials that are in none (tuner/collection.py)."""
JOURNAL = "study.journal"
_SPLITS = "splits.json"
_LOCKS = {SEARCH: "run.lock", TRIALS: "trials/*/*/trial.lock"}
_SECONDS_FOR_A_LOOK = 1.0
"""so long a writer waits for the lock: whoever asks for a run's status shares it for a moment, a writer keeps it"""
_PACKAGES = ("segdec-tuner", "torch", "ray", "optuna", "wandb", "numpy", "opencv-python-headless", "albumentations")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A search, wherever it stands, or a collection of trials. Files are read when asked for, so that it is never out
    of date."""

    directory: Path
    space: Space
    data: str
    """the data set's path, its address in object storage, or the word synthetic"""
    options: Options = field(default_factory=Options)

    @property
    def info(self) -> dict[str, Any]:
        """run.json"""
        found: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        return found

    @property
    def kind(self) -> str:
        """SEARCH or TRIALS."""
        found: str = self.info.get("kind", SEARCH)
        return found

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def records(self) -> list[dict[str, Any]]:
        """One for each finished trial."""
        return records.read(self.directory)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the best completed trial that meets the constraints."""
        return records.best(self.records)

    def repeats(self, seeds: int | None = None) -> Repeats | None:
        """What repeats the run is to have: those that were begun, else those of its space; with at most `seeds`
        trainings of one configuration, if that is given. None if nobody asks for any."""
        begun = self.info.get("repeats")
        asked = self.space.repeats
        if begun:
            asked = Repeats(**{name: value for name, value in begun.items() if name != "state"})
        if seeds is not None:
            asked = replace(asked or Repeats(), seeds=seeds)
        return asked

    def selection(self) -> Selection | None:
        """Which configuration is best, by all its trainings; None where no trial has completed that may win."""
        prefer = (self.repeats() or Repeats()).prefer
        return selection.select(self.records, selection.read(self.directory), self.space.constraints, prefer)

    @property
    def study(self) -> Path | str:
        """Where the Optuna study lies: the journal, or the URL of a database.

        ValueError if the environment should name it and does not.
        """
        return self.directory / JOURNAL if self.options.study is None else study_url(self.options.study)

    @property
    def metrics(self) -> dict[str, Any]:
        """report/metrics.json"""
        found: dict[str, Any] = json.loads((self.directory / "report" / "metrics.json").read_text())
        return found

    @property
    def source(self) -> Source:
        """Where the data set lies."""
        return _source(self.space, self.data)

    @property
    def data_folder(self) -> Path:
        """Where the data set lies on this machine; the synthetic one, and copies from elsewhere, lie in the cache."""
        return self.source.folder

    def splits(self) -> Splits:
        """The samples of each split as the run was created with them; looks at no file of the data set.

        ValueError if splits.json is broken.
        """
        return splits_file.read(self.directory / _SPLITS, self.data_folder, self.info["data"]["fingerprint"])

    def verify(self, samples: list[Sample], console: Console | None = None) -> None:
        """Hashes the files of these samples, before they are opened; needs the lock. Fetches what lies elsewhere.

        ValueError that names those that are missing or changed. Where the data have moved, run.json says so from now.
        """
        self.check_files(samples, console)
        if self.info["data_path"] != self.data:
            self.note(data_path=self.data)

    def check_files(self, samples: list[Sample], console: Console | None = None) -> None:
        """The same without a lock, and without a note."""
        source = self.source
        source.fetch(console)
        way_out = "restore the files, say with --data where the same data lie now"
        if self.data == SYNTHETIC:
            way_out = f"remove {source.folder}, which is then made again"
        another = "start a new run" if self.kind == SEARCH else "name another collection with --name"
        try:
            splits_file.check_files(samples, source.folder, f"{way_out}, or {another}")
        except ValueError as error:
            if not source.is_remote:
                raise
            raise ValueError(str(error).replace(str(source.folder), source.name)) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The one writer of the directory; the kernel frees the lock when the process ends, however it ends."""
        deadline = time.monotonic() + _SECONDS_FOR_A_LOOK
        with (self.directory / "run.lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() < deadline:
                        time.sleep(0.01)
                        continue
                raise ValueError(f"{self.directory} is written by another process; wait for it, or stop it")
            yield

    def is_running(self) -> bool:
        """Whether some process holds a lock."""
        return self.count_writers() > 0

    def count_writers(self) -> int:
        """How many processes hold a lock: that of a search, or of a collection each trial its own."""
        return sum(_is_held(lock) for lock in self.directory.glob(_LOCKS[self.kind]))

    def last_written(self) -> float:
        """When a session that was killed ended, as near as files tell, seconds since the epoch; 0 if none has begun.

        A journal is written all the time; a study elsewhere leaves the records here and the checkpoints of trials.
        """
        journal = self.directory / JOURNAL
        signs = [journal] if journal.exists() else [self.directory / records.FILE, *self.directory.glob("trials/*/*")]
        return max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)

    def check_version(self) -> None:
        """ValueError if this version describes the space otherwise than the one that made the run, by a default that
        was added: the study would not be found."""
        info = self.info
        if self.space.fingerprint() != info["space_fingerprint"]:
            made_by, here = info["versions"]["segdec-tuner"], metadata.version("segdec-tuner")
            raise ValueError(
                f"a search must go on with a version that describes its space as the run does; {self.directory} was "
                f"made by segdec-tuner {made_by}, found {here}; go on with {made_by}, or start a new run with "
                f"`--warm-start {self.directory}`"
            )

    def note(self, **values: Any) -> None:
        """Changes keys of run.json."""
        write_json(self.directory / "run.json", self.info | values)


class NameTaken(ValueError):
    """There is a run of this name."""


def create(
    space: Space,
    data: str | Path,
    runs: Path,
    name: str | None = None,
    options: Options | None = None,
    kind: str = SEARCH,
    console: Console | None = None,
) -> Run:
    """Looks at all the data, and makes the directory of a new run. ValueError for anything that cannot work."""
    options = options or Options()
    data = datasets.checked(data)
    space = _with_options(space, options)
    name = name or space.name
    if not is_name(name):
        raise ValueError(f"a run's name must be {NAME_RULE}, found {name!r}")
    if runs.exists() and not runs.is_dir():
        raise ValueError(f"--runs must be a folder, found the file {runs}")
    directory = runs / name
    if directory.exists():
        raise _taken(directory)
    found = checked_splits(space, data, console)
    folder = _source(space, data).folder
    building = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
    info = {
        "schema": 1,
        "kind": kind,
        "name": directory.name,
        "id": secrets.token_hex(3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(kind),
        "space": space.to_dict(),
        "space_fingerprint": space.fingerprint(),
        "data_path": data,
        "options": asdict(options) if kind == SEARCH else {},  # each trial of a collection has its own
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
        "data": _data_facts(space, found, folder),
        "state": "stopped" if kind == SEARCH else "finished",  # nothing that is asked for is left to do
        "sessions": [],
    }
    building.mkdir(parents=True)
    try:
        splits_file.write(building / _SPLITS, found, folder)
        write_json(building / "run.json", info)
        building.rename(directory)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # made meanwhile
            raise _taken(directory) from None
        raise
    return Run(directory=directory, space=space, data=data, options=options)


def _taken(directory: Path) -> NameTaken:
    return NameTaken(
        f"a run's name must be new, found {directory}; choose another with --name, "
        f"or go on with `tuner resume {directory}`"
    )


def checked_splits(space: Space, data: str | Path, console: Console | None = None) -> Splits:
    """The samples of each split, after a look at every file. ValueError if a search of the space cannot use them.

    Writes nothing but the synthetic set, and copies of what lies elsewhere, into the cache.
    """
    source = _source(space, datasets.checked(data))
    source.fetch(console)
    folder = source.folder
    samples = layouts.read(folder, space.data.layout)
    found = splits.assign(samples, folder, space.data.validation_share, space.data.test_share, space.seed)
    _check_data_fits(space, found, source.name)
    return found


def load(directory: str | Path, data: str | Path | None = None) -> Run:
    """An existing run, whose data now lie in `data` if that is given. ValueError if the folder holds none, or if its
    space was changed: the trials would not be of the space that they seem to be of."""
    if "://" in str(directory):
        raise ValueError(f"a run must be a folder here, found {directory}; `tuner resume {directory}` brings it")
    path = Path(directory)
    if path.name in ("", ".."):  # a run is called by its folder, and `.` says nothing
        path = path.resolve()
    try:
        info = json.loads((path / "run.json").read_text())
        document, options, where = info["space"], Options(**info["options"]), info["data_path"]
        wanted = info["space_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be the folder of a run, with a run.json ({why})") from error
    space = space_file.parse(document, str(path / "run.json"))
    if (found := fingerprint_of(document)) != wanted:
        raise ValueError(
            f"the space in {path / 'run.json'} must be the one that the run was made with, fingerprint {wanted}, found "
            f"{found}; restore it; to search another space, start a new run with `--warm-start {path}`"
        )
    return Run(directory=path, space=space, data=where if data is None else datasets.checked(data), options=options)


def load_search(directory: str | Path, data: str | Path | None = None) -> Run:
    """The same for what only a search can do. ValueError for a collection of trials."""
    run = load(directory, data)
    if run.kind == TRIALS:
        raise ValueError(
            f"{run.directory} must be the folder of a search, found a collection of trials, which has no study, no end "
            f"and no winner; `tuner search SPACE --warm-start {run.directory}` lets a search know them"
        )
    return run


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _with_options(space: Space, options: Options) -> Space:
    budget = replace(
        space.budget,
        trials=space.budget.trials if options.trials is None else options.trials,
        hours=space.budget.hours if options.hours is None else options.hours,
    )
    return replace(space, budget=budget, seed=space.seed if options.seed is None else options.seed)


def _source(space: Space, data: str) -> Source:
    return Source.of(data, space.data.height, space.data.width)


def _check_data_fits(space: Space, found: Splits, data: str) -> None:
    if not found.has_negatives and space.objective.metric in DECISION_METRICS:
        raise ValueError(
            f"objective {space.objective.metric} needs images without a defect, found none in {data}; "
            "use a segmentation metric such as dice_mean"
        )
    of_decision = [bound.metric for bound in space.constraints if bound.metric in CONSTRAINED_DECISION_METRICS]
    if not found.has_negatives and of_decision:
        raise ValueError(
            f"a constraint on {', '.join(of_decision)} needs images without a defect, found none in {data}; "
            "bound a segmentation metric such as recall"
        )
    best_by = space.search["best_by"].samples() if "best_by" in space.search else (space.train.get("best_by"),)
    if not found.has_negatives and {"decision", "both"} & set(best_by):
        raise ValueError(
            f"best_by decision or both needs images without a defect, found none in {data}; "
            "use objective or segmentation"
        )
    searched = space.search.get("num_segmented")
    counts = searched.samples() if searched else (space.train.get("num_segmented", "all"),)
    for one in folds.splits_of_each(found, space.cross_validation, space.seed):
        for count in counts:
            splits.keep_masks(one.train, count)


def _data_facts(space: Space, found: Splits, folder: Path) -> dict[str, Any]:
    named = dict(zip(layouts.SPLITS, found, strict=True))
    return {
        "fingerprint": splits.fingerprint(found),
        "layout": layouts.detect(folder) if space.data.layout == "auto" else space.data.layout,
        "height": space.data.height,
        "width": space.data.width,
        "channels": 3,
        **{name: splits.counts(split) for name, split in named.items()},
        "groups": {name: len({sample.group for sample in split}) for name, split in named.items()},
        "has_negatives": found.has_negatives,
    }


def _command(kind: str) -> str:
    """The command line, where this process is one."""
    name = Path(sys.argv[0])
    is_ours = name.name == "tuner" or name.parts[-2:] == ("tuner", "__main__.py")
    called = "tuner.run_search" if kind == SEARCH else "tuner.run_trial"
    return shlex.join(["tuner", *sys.argv[1:]]) if is_ours else called


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def _hardware() -> dict[str, Any]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30), "gpus": gpus}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
