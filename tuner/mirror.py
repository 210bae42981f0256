"""The copy of a run at its storage: kept up to date while the run is worked on, and brought back elsewhere.

The run's own folder stays the one that is worked in. All of it but `trials/` is mirrored; the checkpoints below
`trials/` are written there by the workers themselves. The mirror decides nothing, and a storage that fails stops
nothing, with one exception: `owner.json` there says which process works on the run, and one that finds another's name
in it stops.

What the storage holds is never ahead of the journal there: it goes first in each pass, and what changes during a pass
waits for the next one. The rest goes in the order in which it was written, so that a file that is written last, as
`evaluation/selection.json` is, arrives last; checkpoints that the journal needs no more are removed when all is there.
Only what this folder has sent is taken away again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from model.files import write_json
from tuner.checkpoints import Trials
from tuner.options import problem_of_storage
from tuner.remote import Folder, StorageFailed, check_token, is_below
from tuner.run import JOURNAL, NameTaken, Run, load
from tuner.space import NAME_RULE, is_name

logger = logging.getLogger(__name__)

OWNER = "owner.json"
_KNOWN = ".mirrored.json"
"""in the run's own folder: what the storage holds, so that a resume does not send all of it again"""

_SECONDS_BETWEEN_BEATS = 10.0
_SECONDS_BETWEEN_LOOKS = 50.0
"""between two looks at an owner's counter: a beat at a storage that takes its time, and some patience"""

_SECONDS_AT_THE_START = 30.0
_SECONDS_AT_THE_END = 60.0
"""so long a session waits for what is not mirrored yet"""

_LONGEST_WAIT_S = 60.0
_SLOW = ("wandb", "tensorboard")
"""Folders of trackers, whose files grow all the time: they are sent once a minute, and at the end."""
_SECONDS_BETWEEN_SLOW = 60.0

Signature = tuple[int, int, int]
"""size, time of change and inode of a file: what tells that it is another one"""


class Mirror:
    """That of a run without storage: mirrors nothing."""

    lost: str | None = None
    """who works on the run instead of us, as a message; None while it is ours"""
    failing: bool = False
    """whether the storage is out of reach"""

    def __init__(self, directory: Path, there: Folder | None = None) -> None:
        self.directory = directory
        self.trials = _trials(directory, there)

    def changed(self) -> None:
        """Something in the run's folder is new."""

    def later(self, job: Callable[[], None]) -> None:
        """Does something at the storage that nobody waits for; again, until it can be reached."""
        job()

    def begin(self) -> None:
        """Nothing is trained before the storage knows of the session; but a storage that fails stops nothing."""


class StorageMirror(Mirror):
    """One that a thread keeps up to date, and another one says that we live."""

    def __init__(self, directory: Path, there: Folder, session: str) -> None:
        super().__init__(directory, there)
        self._there, self._session = there, session
        self._known: dict[str, Signature | None] = {}
        """what lies at the storage that this folder has sent; None where nobody knows which content it is"""
        self._jobs: deque[Callable[[], None]] = deque()
        self._turn = threading.Condition()
        self._asked = self._done = 0
        self._whole = True
        """whether the next pass takes the slow folders too"""
        self._last_whole = 0.0
        self._closed = threading.Event()
        self._beats = 0
        self._ready = False
        """whether it is known what lies at the storage"""
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._work, self._beat)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def changed(self) -> None:
        with self._turn:
            self._asked += 1
            self._turn.notify_all()

    def later(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self.changed()

    def begin(self) -> None:
        self.flush(_SECONDS_AT_THE_START)

    def flush(self, seconds: float) -> bool:
        """Waits until the storage holds all that there is now; whether it does."""
        with self._turn:
            self._whole = True
            self._asked += 1
            wanted = self._asked
            self._turn.notify_all()
            return self._turn.wait_for(lambda: self._done >= wanted or self.lost is not None, seconds)

    def close(self, seconds: float) -> None:
        """The end of a session: waits for the mirror, says what it lacks, gives the run free where it lacks nothing."""
        is_whole = self.flush(seconds) if seconds else not self._lacking()
        self._closed.set()
        self.changed()
        if self.lost:
            return
        if not is_whole:
            lacking = ", ".join(sorted(self._lacking())) or "the last changes"
            logger.warning(
                "not mirrored to %s: %s; `tuner resume %s` does it", self._there.address, lacking, self.directory
            )
            return
        self._threads[1].join(_SECONDS_BETWEEN_BEATS)  # or a last beat would take the run back
        with suppress(OSError):
            self._there.write(OWNER, _owner(self._session, self._beats, released=True))

    def forget(self) -> None:
        """Leaves nothing of a run that was not begun, if it is still ours."""
        self._closed.set()
        self.changed()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_SECONDS_BETWEEN_BEATS)  # or what it is about to write would stay
        with suppress(OSError):
            owner, info = _read(self._there, OWNER), _read(self._there, "run.json")
            if owner and owner["session"] == self._session and not (info and info["sessions"]):
                self._there.clear()

    # The thread that mirrors

    def _work(self) -> None:
        wait = 1.0
        while self.lost is None:
            with self._turn:
                self._turn.wait_for(lambda: self._asked > self._done or self._closed.is_set())
                if self._closed.is_set():
                    return
                asked = self._asked
                whole, self._whole = self._whole or time.monotonic() - self._last_whole > _SECONDS_BETWEEN_SLOW, False
            began = time.monotonic()
            try:
                is_whole = self._pass(whole)
            except Exception as error:  # a storage that fails, or a file that cannot be read: neither ends a search
                if not self.failing:
                    logger.warning("%s; the search goes on, and what changes is mirrored when that is over", error)
                self.failing = True
                self._whole = self._whole or whole
                self._closed.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
                continue
            if self.failing:
                logger.warning("the storage %s is back, and holds all that was written meanwhile", self._there.address)
            self.failing, wait = False, 1.0
            with self._turn:
                if is_whole:
                    self._done = asked
                    self._turn.notify_all()
            self._closed.wait(min(time.monotonic() - began, 5.0))  # a mirror that is slow leaves half the time free

    def _pass(self, whole: bool) -> bool:
        """Brings the storage up to date; False if a file changed meanwhile, and is left for the next pass."""
        if self._is_lost():
            return False
        if not self._ready:
            self._known = _known(self.directory, self._there)
            self._ready = True
        jobs = len(self._jobs)  # what the journal that is sent now does not need any more
        here = {name: at for name, at in _files(self.directory).items() if whole or name.split("/")[0] not in _SLOW}
        gone = [name for name in self._known if name not in here and (whole or name.split("/")[0] not in _SLOW)]
        news = [name for name, signature in here.items() if self._known.get(name) != signature]
        if any(name not in self._known for name in news):  # or one that is cut short here is never taken away there
            self._known |= {name: None for name in news if name not in self._known}
            self._remember()
        is_whole = True
        if JOURNAL not in news:
            self._take_away(gone)
        for name in sorted(news, key=lambda name: (name != JOURNAL, here[name][1], name)):
            if self.lost or self._closed.is_set():
                return False
            path = self.directory / name
            try:
                now = _signature(path)
                if now != here[name] and name != JOURNAL and name.split("/")[0] not in _SLOW:
                    is_whole = False
                    continue
                self._there.put(path, name)
            except FileNotFoundError:
                if path.exists():
                    raise
                is_whole = False  # gone by now
                continue
            self._known[name] = now
            if name == JOURNAL:
                self._take_away(gone)
        for _ in range(jobs):
            self._do(self._jobs.popleft())
        if whole:
            self._last_whole = time.monotonic()
        if gone or news:
            self._remember()
        return is_whole

    def _take_away(self, gone: list[str]) -> None:
        """Before other files are sent: `evaluation/selection.json` goes before what it vouches for changes."""
        self._there.remove(gone)
        for name in gone:
            self._known.pop(name, None)

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except StorageFailed:  # again, in the next pass
            self._jobs.appendleft(job)
            raise
        except Exception as error:  # it would fail for ever
            logger.warning("left undone at %s: %s: %s", self._there.address, type(error).__name__, error)

    def _lacking(self) -> set[str]:
        """The files and folders of the run that the storage lacks, by their first names."""
        here = _files(self.directory)
        known = dict(self._known)  # in one step, for the other thread changes it
        return {name.split("/")[0] for name in here.keys() | known if known.get(name) != here.get(name)}

    def _remember(self) -> None:
        write_json(self.directory / _KNOWN, _memory(self._there, self._session, self._known))

    # The thread that says that we live

    def _beat(self) -> None:
        took = 0.0
        while not self._closed.wait(max(0.1, _SECONDS_BETWEEN_BEATS - took)) and self.lost is None:
            began = time.monotonic()
            with suppress(OSError):  # the other thread says so
                if not self._is_lost() and not self._closed.is_set():
                    self._beats += 1
                    self._there.write(OWNER, _owner(self._session, self._beats))
            took = time.monotonic() - began

    def _is_lost(self) -> bool:
        owner = _read(self._there, OWNER)
        if self.lost is None and owner and owner["session"] != self._session:
            self.lost = (
                f"the run went on elsewhere: process {owner['pid']} on {owner['host']} works on it now; this one has "
                f"stopped, and {self.directory} is not the newest any more"
            )
            logger.warning("%s", self.lost)
            with self._turn:
                self._turn.notify_all()
        return self.lost is not None


@contextmanager
def mirrored(run: Run, console: Console | None = None) -> Iterator[Mirror]:
    """The mirror of a run while it is worked on; needs the lock. ValueError if somebody else works on it, or has."""
    if run.options.storage is None:
        yield Mirror(run.directory)
        return
    check_apart(run.options.storage, run.directory)
    there = Folder(run.options.storage) / run.name
    session = _take(run, there, console)
    mirror = StorageMirror(run.directory, there, session)
    mirror.start()
    seconds = _SECONDS_AT_THE_END
    try:
        if run.info["sessions"]:  # what it lacks from a session before
            mirror.changed()
        yield mirror
    except KeyboardInterrupt:  # a second Ctrl-C
        seconds = 0.0
        raise
    finally:
        if run.info["sessions"]:
            mirror.close(seconds)
        else:  # nothing was begun, and the name stays free
            mirror.forget()


def trials_of(run: Run) -> Trials:
    """Where the checkpoints of a run lie."""
    return _trials(run.directory, Folder(run.options.storage) / run.name if run.options.storage else None)


def _trials(directory: Path, there: Folder | None) -> Trials:
    return Trials((directory / "trials").absolute(), there / "trials" if there else None)


def check_free(storage: str, name: str) -> None:
    """NameTaken if a run of this name lies at the storage."""
    if not is_name(name):
        raise ValueError(f"a run's name must be {NAME_RULE}, found {name!r}")
    there = Folder(storage) / name
    if (found := there.entries()) and ("run.json" in found or there.files()):  # a mount may hold empty folders
        way_out = f"or go on with `tuner resume {there.address}`" if "run.json" in found else "or remove what is there"
        raise NameTaken(f"a run's name must be new, found {there.address}; choose another with --name, {way_out}")


def check_apart(storage: str, directory: Path) -> None:
    """ValueError if a run would be mirrored on to itself: each pass would replace files that are being written."""
    place = (Folder(storage) / directory.name).local
    if place is None:
        return
    there, here = place.resolve(), directory.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise ValueError(
            f"a run's place at the storage must lie apart from its own folder, found {there} for {here}; name another "
            "folder with --storage or --runs, or leave --storage out where all nodes see --runs"
        )


def bring(address: str, runs: Path, console: Console | None = None) -> Path:
    """The folder of the run that lies at an address, brought to this machine unless it is here and as new.

    ValueError if there is none, if somebody works on it, or if there is another folder of its name here.
    """
    if problem := problem_of_storage(address):
        raise ValueError(problem)
    if "://" not in address:
        address = str(Path(address).expanduser().absolute())
    there = Folder(address)
    try:
        info = _read(there, "run.json")
    except StorageFailed:
        check_token(address, "driver")  # which knows the way out
        raise
    if info is None:
        raise ValueError(
            f"{address} must be a run at a storage, STORAGE/NAME, with a run.json, found none; a search writes it "
            "before its first trial"
        )
    storage, _, name = there.address.partition("?")[0].rstrip("/").rpartition("/")
    query = address.partition("?")[1] + address.partition("?")[2] if "://" in address else ""
    storage += query
    if not is_name(name):
        raise ValueError(f"a run's name must be {NAME_RULE}, found {name!r} in {address}")
    directory = runs / name
    if directory.exists():
        mine = load(directory).info
        if mine["id"] != info["id"] or _unknown_sessions(mine, info):
            is_what = "another run" if mine["id"] != info["id"] else "an older state of it"
            raise ValueError(
                f"{directory} must be the run that lies at {address}, and as new, or not be there, found {is_what}; "
                "move it away, or name another folder with --runs"
            )
        return directory
    seen = _wait_for_owner(there, {}, console)
    building = directory.with_name(f".{name}-{secrets.token_hex(4)}")
    building.mkdir(parents=True)
    try:
        for file in _listed(there):
            if not is_below(file):
                raise StorageFailed(
                    f"{address} holds {file!r}, which would lie outside of {directory}; remove it there"
                )
            there.get(file, building / file)
        (building / "trials").mkdir(exist_ok=True)
        if info["options"].get("storage") != storage:  # a mount may lie elsewhere here
            write_json(building / "run.json", info | {"options": info["options"] | {"storage": storage}})
        known = {name: at for name, at in _files(building).items() if name != "run.json"}
        write_json(building / _KNOWN, _memory(there, "", known) | {"seen": seen})
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return directory


def is_mirror(address: str) -> bool:
    """Whether an address is that of a run at a storage, not of a run's own folder."""
    return "://" in address or (Path(address) / OWNER).exists()


def update(run: Run, console: Console | None = None) -> None:
    """Mirrors what a verb beside the search has written; a search that runs does so itself."""
    if run.options.storage is None or run.is_running():
        return
    try:
        with run.locked(), mirrored(run, console):
            pass
    except (ValueError, OSError) as error:
        logger.warning("not mirrored: %s", error)


def _take(run: Run, there: Folder, console: Console | None) -> str:
    """Makes the run ours at its storage; the session's id."""
    theirs = _read(there, "run.json")
    if theirs is not None:
        if theirs["id"] != run.info["id"]:
            raise ValueError(f"{there.address} must hold this run, found another one, {theirs['id']}; move it away")
        if _unknown_sessions(run.info, theirs):
            raise ValueError(
                f"{run.directory} must be the newest state of its run, and {there.address} has sessions that it does "
                f"not know; `tuner resume {there.address} --runs DIR` goes on from there in another folder"
            )
    known = json.loads((run.directory / _KNOWN).read_text()) if (run.directory / _KNOWN).exists() else {}
    owner = _wait_for_owner(there, known, console)
    if owner and owner["session"] != known.get("session") and _has_unknown_openings(run.directory, there):
        raise ValueError(
            f"{run.directory} must know of each opening of the test split, and {there.address} has some that it does "
            f"not; `tuner resume {there.address} --runs DIR` goes on from there in another folder"
        )
    session = secrets.token_hex(8)
    there.write(OWNER, _owner(session, 0))
    if run.info["sessions"]:
        write_json(run.directory / _KNOWN, _memory(there, session, known.get("files", {})))
    return session


def _wait_for_owner(there: Folder, known: dict[str, Any], console: Console | None) -> Any:
    """The last owner, once nobody works on a run; ValueError while somebody does. Nobody waits for a session of this
    very folder, which cannot live, for we hold the lock; nor for one that has not stirred since it was looked at."""
    owner = _read(there, OWNER)
    if owner is None or owner["released"] or owner["session"] == known.get("session") or owner == known.get("seen"):
        return owner
    who = f"process {owner['pid']} on {owner['host']}"
    if console is not None:
        console.print(f"{who} worked on {there.address} last; looking {_SECONDS_BETWEEN_LOOKS:g} s whether it lives")
    time.sleep(_SECONDS_BETWEEN_LOOKS)
    again = _read(there, OWNER)
    if again is not None and again != owner and not again["released"]:
        raise ValueError(f"{there.address} must be worked on by one process, and {who} does; stop that one first")
    return again


def _has_unknown_openings(directory: Path, there: Folder) -> bool:
    """Whether somebody else has looked at the test split of this run."""
    name = "evaluation/openings.jsonl"
    try:
        theirs = there.read(name).splitlines()
    except FileNotFoundError:
        return False
    here = directory / name
    return bool(set(theirs) - set(here.read_bytes().splitlines() if here.exists() else []))


def _owner(session: str, count: int, released: bool = False) -> bytes:
    found = {"session": session, "host": socket.gethostname(), "pid": os.getpid(), "count": count, "released": released}
    return (json.dumps(found) + "\n").encode()


def _unknown_sessions(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    known = {session["started"] for session in mine["sessions"]}
    return any(session["started"] not in known for session in theirs["sessions"])


def _read(there: Folder, name: str) -> Any:
    """A JSON document, or None."""
    try:
        return json.loads(there.read(name))
    except FileNotFoundError:
        return None
    except ValueError:  # on a mount it may be seen half written
        raise StorageFailed(f"{there.address}/{name} is no JSON") from None


def _files(directory: Path) -> dict[str, Signature]:
    """What is mirrored of a run: no locks, nothing that is still being made, no links, and not `trials/`."""
    found = {}
    for folder, folders, names in os.walk(directory):
        at = Path(folder)
        folders[:] = [name for name in folders if _is_mirrored(name) and not (at == directory and name == "trials")]
        for name in names:
            with suppress(FileNotFoundError):
                if _is_mirrored(name) and not (at / name).is_symlink():
                    found[str((at / name).relative_to(directory))] = _signature(at / name)
    return found


def _is_mirrored(name: str) -> bool:
    return not (name.startswith(".") or name.endswith((".lock", ".part")) or name == OWNER)


def _signature(path: Path) -> Signature:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _listed(there: Folder) -> dict[str, int]:
    """The sizes of all files of a run at its storage but those of trials, and its owner."""
    found: dict[str, int] = {}
    for name, size in there.entries().items():
        if not _is_mirrored(name) or name == "trials":
            continue
        if size is not None:
            found[name] = size
        else:
            found |= {f"{name}/{file}": size for file, size in (there / name).files().items()}
    return found


def _known(directory: Path, there: Folder) -> dict[str, Signature | None]:
    """What lies at the storage that this folder remembers to have sent, with its content where that is known. What
    somebody else has put there stays."""
    remembered: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        memory = json.loads((directory / _KNOWN).read_text())
        remembered = memory["files"] if memory["address"] == there.address else {}
    known: dict[str, Signature | None] = {}
    for name, size in _listed(there).items():
        if name in remembered:
            at = remembered[name]
            known[name] = (at[0], at[1], at[2]) if at and at[0] == size else None
    return known


def _memory(there: Folder, session: str, files: Any) -> dict[str, Any]:
    return {"address": there.address, "session": session, "files": files}
