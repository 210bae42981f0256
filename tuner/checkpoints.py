"""The checkpoints of a search's trials: where they lie, which of them is the newest, which may go.

Workers write them straight to where they are to lie: below the run's own `trials/`, which all nodes must then see, or
below that of the run's storage. There is one folder a start of a trial, `attempt-N/TRIAL[.k]/`, and in it one a
checkpoint. The manifest is written last: without it, or with files unlike it, a folder is no checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import checkpoint
from model.config import DEFAULTS, JUDGING_FIELDS, RunConfig
from model.files import FULL_DISK, write_atomically, write_json
from tuner.remote import Folder, StorageFailed, copy_durably, is_below, patiently
from tuner.trial import previews as read_previews

logger = logging.getLogger(__name__)

_CONFIG = "config.json"
"""whose training a checkpoint is of; the number of a trial may have been given twice"""

_KEPT_ON_THE_WAY = 2
"""so many checkpoints a start of a trial keeps while it runs: the newest may have been cut short"""

_PATIENCE_S = 1800.0
"""so long a worker waits for a storage that it cannot do without"""


@dataclass(frozen=True)
class Trials:
    """Where the checkpoints of a run lie; as workers are told."""

    local: Path
    """the run's own `trials/`, an absolute path; Ray's files lie there too"""
    there: Folder | None = None
    """that of the run's storage, where checkpoints lie if there is one"""

    @property
    def place(self) -> Folder:
        """Where checkpoints lie."""
        return self.there or Folder(str(self.local))

    def new_attempt(self) -> int:
        """The number of a session that nobody had before, whichever machine it was on."""
        names = [path.name for path in self.local.glob("attempt-*")]
        if self.there:
            names += self.there.entries()
        number = 1 + max((int(name[8:]) for name in names if re.fullmatch(r"attempt-\d+", name)), default=0)
        if self.there:  # an object store knows no empty folders
            self.there.write(f"attempt-{number}/begun.json", b"{}\n")
        return number


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    address: str
    progress: dict[str, Any]
    """what its trial had reached"""
    files: frozenset[str]
    """the relative paths of all that was sealed"""

    def holds(self, folder: str) -> bool:
        return any(name.startswith(f"{folder}/") for name in self.files)


# Asked by the driver


def newest(trials: Trials, trial: str, config: RunConfig | None = None) -> Found | None:
    """The whole checkpoint of a trial that has come furthest, over all attempts. One that is of another training than
    that of `config` is none of this trial."""
    if trials.there is None:
        whole = [found for f in _folders(trials.local, trial, "checkpoint_*") if (found := _found_here(f, config))]
        return max(whole, key=lambda found: found.progress["epochs"], default=None)
    for name, sizes in _there(trials.there, trial):
        if found := _found(trials.there / name, sizes, config):
            return found
    return None


def prune(trials: Trials, trial: str, keep: RunConfig | None) -> None:
    """Removes all checkpoints of a trial and what was left half written, but the checkpoint of the training that is to
    be kept that has come furthest; nothing if there is none such."""
    kept = newest(trials, trial, keep) if keep else None
    if keep and kept is None:
        return
    here = _by_age(_folders(trials.local, trial, "checkpoint_*"))
    if trials.there is None:
        here = [folder for folder in here if kept is None or str(folder.resolve()) != kept.address]
    elif keep:  # pictures alone
        here = here[:-1]
    for folder in [*here, *_folders(trials.local, trial, ".checkpoint_*")]:
        shutil.rmtree(folder, ignore_errors=True)
    if trials.there:
        for name, sizes in _there(trials.there, trial, ("checkpoint_", ".checkpoint_")):
            if kept is None or (trials.there / name).address != kept.address:
                _remove(trials.there / name, sizes)


def previews(trials: Trials, trial: str) -> dict[str, bytes]:
    """Pictures of the newest checkpoint, if they lie on a disk that the driver sees."""
    folders = _by_age(_folders(trials.local, trial, "checkpoint_*/previews"))
    with suppress(FileNotFoundError):  # removed meanwhile
        return read_previews(folders[-1].parent) if folders else {}
    return {}


def keep_previews(trials: Trials, folder: str, epochs: int, pictures: Mapping[str, bytes]) -> None:
    """Pictures of a checkpoint that lies elsewhere, put where those of one here would lie."""
    start = trials.local / folder
    target = start / _name(epochs) / "previews"
    target.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        write_atomically(target / f"{name}.png", data)
    for other in start.glob("checkpoint_*"):
        if other.name != _name(epochs):
            shutil.rmtree(other, ignore_errors=True)


# Done by a worker


@dataclass
class Writer:
    """Copies the sealed checkpoint folders of one start of a trial to where they are to lie."""

    trials: Trials
    folder: str
    """attempt-N/TRIAL[.k]"""
    config: dict[str, Any]
    _written: list[tuple[str, list[str]]] = field(default_factory=list)
    """names of checkpoints that lie there, with their files"""
    _failing: bool = False

    def write(self, source: Path, epochs: int, last: bool) -> None:
        """An epoch's checkpoint that cannot be written is left out, and the next one is tried again; the last one must
        arrive, which may take half an hour, then StorageFailed. A disk of this machine that is full is an OSError."""
        try:
            patiently(lambda: self._copy(source, _name(epochs)), _PATIENCE_S if last else 0.0)
        except StorageFailed as error:
            if last:
                raise
            if not self._failing:
                logger.warning("%s/%s is not written, the trial goes on: %s", self.folder, _name(epochs), error)
            self._failing = True
            return
        self._failing = False
        self._prune()

    def _copy(self, source: Path, name: str) -> None:
        with _outages_told(self.trials.place):
            files = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
            if self.trials.place.local:
                _copy_locally(source, files, self.trials.place.local / self.folder / name, self.config)
            else:
                target = self.trials.place / self.folder / name
                for file in files:
                    if file != checkpoint.MANIFEST:
                        target.put(source / file, file)
                target.write(_CONFIG, json.dumps(self.config).encode())
                target.put(source / checkpoint.MANIFEST, checkpoint.MANIFEST)
            self._written.append((name, [*files, _CONFIG]))

    def _prune(self) -> None:
        while len(self._written) > _KEPT_ON_THE_WAY:
            name, files = self._written[0]
            if self.trials.place.local:
                shutil.rmtree(self.trials.place.local / self.folder / name, ignore_errors=True)
            else:
                try:
                    _remove(self.trials.place / self.folder / name, files)
                except OSError:
                    return  # next time
            del self._written[0]


class Torn(ValueError):
    """A checkpoint whose files are not what they were when it was sealed."""


def fetch(address: str, into: Path, within: str = "") -> Path:
    """The folder of a checkpoint, or what lies `within` it, copied into an empty folder of this machine: where it lies
    it may be removed while it is read.

    Waits for a storage that is out of reach, then StorageFailed; Torn if what came is not what was sealed.
    """
    place = Folder(address)

    def copy() -> None:
        manifest = json.loads(place.read(checkpoint.MANIFEST))
        for name in manifest:
            if not is_below(name):
                raise ValueError(f"its manifest names {name!r}, which lies outside of it")
            if not within or name.startswith(f"{within}/"):
                place.get(name, into / name)
        place.get(checkpoint.MANIFEST, into / checkpoint.MANIFEST)

    try:
        patiently(copy, _PATIENCE_S)
    except (FileNotFoundError, ValueError) as error:
        raise Torn(f"the checkpoint {address} is not whole any more: {error}") from error
    if not checkpoint.is_whole(into, within):
        raise Torn(f"the checkpoint {address} must be as it was sealed, and its files have other checksums")
    return into / within


def discard(address: str) -> None:
    """A folder that is torn counts as a checkpoint no more."""
    patiently(lambda: Folder(address).remove([checkpoint.MANIFEST]), _PATIENCE_S)


def patiently_newest(trials: Trials, trial: str, config: RunConfig) -> Found | None:
    """As `newest`, for a worker."""
    return patiently(lambda: newest(trials, trial, config), _PATIENCE_S)


@contextmanager
def _outages_told(place: Folder) -> Iterator[None]:
    """A mount that fails is an outage like any other; a disk that is full is not."""
    try:
        yield
    except StorageFailed:
        raise
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise StorageFailed(f"the storage {place.address} failed: {error}") from error


def _copy_locally(source: Path, files: list[str], target: Path, config: dict[str, Any]) -> None:
    """The target is whole and on the disk, or it is not there."""
    building = target.with_name(f".{target.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for file in files:
            (building / file).parent.mkdir(parents=True, exist_ok=True)
            copy_durably(source / file, building / file)
        write_json(building / _CONFIG, config)
        for folder in {building, *((building / file).parent for file in files)}:
            _sync_folder(folder)
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
        _sync_folder(target.parent)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _name(epochs: int) -> str:
    return f"checkpoint_{epochs:06d}"


def _folders(trials: Path, trial: str, pattern: str) -> list[Path]:
    """What lies in the folders of a trial: one an attempt, and one more for each time that its worker died."""
    return [path for name in (trial, f"{trial}.*") for path in trials.glob(f"attempt-*/{name}/{pattern}")]


def _by_age(folders: list[Path]) -> list[Path]:
    """Those that are still there, the newest last."""
    times = {}
    for folder in folders:
        with suppress(FileNotFoundError):
            times[folder] = folder.stat().st_mtime
    return sorted(times, key=lambda folder: times[folder])


def _there(
    place: Folder, trial: str, beginnings: tuple[str, ...] = ("checkpoint_",)
) -> list[tuple[str, dict[str, int]]]:
    """The same of a place that is listed: checkpoint folders with the sizes of their files, the furthest first."""
    found: dict[str, dict[str, int]] = {}
    for attempt in place.entries():
        if attempt.startswith("attempt-"):
            for path, size in place.files(f"{attempt}/{trial}").items():
                parts = path.split("/", 3)
                if len(parts) == 4 and parts[1].split(".")[0] == trial and parts[2].startswith(beginnings):
                    found.setdefault("/".join(parts[:3]), {})[parts[3]] = size
    return sorted(found.items(), key=lambda item: item[0].rpartition("_")[2], reverse=True)


def _found(folder: Folder, sizes: Mapping[str, int], config: RunConfig | None) -> Found | None:
    """A checkpoint that is whole, as far as its files' sizes tell, and of this training."""
    with suppress(FileNotFoundError, ValueError, KeyError):  # removed meanwhile, or torn
        manifest = json.loads(folder.read(checkpoint.MANIFEST))
        is_whole = all(sizes.get(file) == size for file, (size, _) in manifest.items())
        if is_whole and _is_same(json.loads(folder.read(_CONFIG)), config):
            return Found(folder.address, json.loads(folder.read("progress.json")), frozenset(manifest))
    return None


def _found_here(folder: Path, config: RunConfig | None) -> Found | None:
    """The same of a folder here, with every byte looked at."""
    with suppress(OSError, ValueError, KeyError):  # removed meanwhile, or torn
        if _is_of(folder, config) and checkpoint.is_whole(folder):
            manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
            return Found(str(folder.resolve()), checkpoint.load_progress(folder), frozenset(manifest))
    return None


def _remove(folder: Folder, files: Mapping[str, int] | list[str]) -> None:
    """The manifest first: what is left of it is no checkpoint."""
    folder.remove([checkpoint.MANIFEST, *(file for file in files if file != checkpoint.MANIFEST)])


def _is_of(folder: Path, config: RunConfig | None) -> bool:
    """Whether a folder here holds this training. Earlier versions did not say, and gave no number twice."""
    try:
        return _is_same(json.loads((folder / _CONFIG).read_text()), config)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _is_same(kept: Mapping[str, Any], config: RunConfig | None) -> bool:
    if config is None:
        return True
    fields = {name: value for name, value in (DEFAULTS | dict(kept)).items() if name not in JUDGING_FIELDS}
    return fields == json.loads(json.dumps(config.training_fields()))
