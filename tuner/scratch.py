"""Scratch folders of processes that may be killed, as Ray ends a trial that is stopped on a GPU. What such a process
leaves behind, a checkpoint of a hundred MB, is removed by whoever makes the next folder on that machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

_PREFIX = f"segdec-scratch-{os.uname().nodename}-"
"""Several machines may share a folder, and not each other's locks."""

_LOCK = ".lock"
_outer: ContextVar[Path | None] = ContextVar("outer", default=None)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for as long as this lasts, or its process does."""
    if outer := _outer.get():
        with tempfile.TemporaryDirectory(dir=outer) as inner:
            yield Path(inner)
        return
    _remove_abandoned()
    descriptor, lock = _locked_file()
    folder = lock.with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder, lock)
        os.close(descriptor)


@contextmanager
def scratch_within(folder: Path) -> Iterator[None]:
    """This thread makes its scratch folders in one that another process owns."""
    before = _outer.set(folder)
    try:
        yield
    finally:
        _outer.reset(before)


def _locked_file() -> tuple[int, Path]:
    """A new file with a lock on it, which the kernel frees when the process ends, however it ends. Where a file system
    knows no locks, what is left there stays."""
    while True:
        descriptor, name = tempfile.mkstemp(_LOCK, _PREFIX)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            Path(name).unlink()  # or it would look abandoned
            return descriptor, Path(name)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # somebody found it before it was locked


def _remove_abandoned() -> None:
    """Removes this user's folders on whose file nobody has a lock."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}"):
        with suppress(OSError), _opened(lock) as descriptor:  # in use, of another user, or gone
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.with_suffix(""), lock)


@contextmanager
def _opened(lock: Path) -> Iterator[int]:
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # anybody may put anything there
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(folder: Path, lock: Path) -> None:
    """A folder that cannot go yet, since a child of the dead still writes there, keeps its file to be found by."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        lock.unlink(missing_ok=True)
