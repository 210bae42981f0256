"""Scratch folders of processes that may be killed, as Ray ends a trial that is stopped on a GPU. What such a process
leaves behind, a checkpoint of a hundred MB, is removed by whoever makes the next folder on that machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = "segdec-scratch-", ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for as long as this lasts, or its process does."""
    _remove_abandoned()
    descriptor, name = _locked_file()
    folder = name.with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            name.unlink()
        os.close(descriptor)


def _locked_file() -> tuple[int, Path]:
    """A new file with a lock on it, which the kernel frees when the process ends, however it ends."""
    while True:
        descriptor, name = tempfile.mkstemp(_LOCK, _PREFIX)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # somebody found it before it was locked


def _remove_abandoned() -> None:
    """Removes the folders on whose file nobody has a lock."""
    for name in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}"):
        with suppress(OSError), name.open() as file:  # in use, of another user, or just removed by another process
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(name.with_suffix(""), ignore_errors=True)
            name.unlink()
