"""Scratch folders, also of processes that are killed."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tuner import scratch
from tuner.scratch import scratch_folder, scratch_within

KILLED = """
import os, signal
from tuner.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "training.pt").write_bytes(b"weights")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_lasts_as_long_as_it_is_used(temporary: Path) -> None:
    with scratch_folder() as outer, scratch_folder() as inner:
        (outer / "file").write_text("kept")
        assert outer != inner
        assert (list(inner.iterdir()), (outer / "file").read_text()) == ([], "kept")
        assert inner.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_leaves_is_gone_with_the_next_folder(temporary: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode == -9
    assert len(list(temporary.rglob("training.pt"))) == 1
    with scratch_folder() as folder:
        assert {path.name for path in temporary.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_what_a_process_uses_stays(temporary: Path) -> None:
    command = [sys.executable, "-c", KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print(folder); input()")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        with scratch_folder():
            assert (folder / "checkpoint" / "training.pt").exists()
        process.communicate("\n")
    assert list(temporary.iterdir()) == []


def test_a_folder_that_cannot_go_yet_goes_later(temporary: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scratch.shutil, "rmtree", lambda *_, **__: None)  # a child of the dead process writes there
        with scratch_folder() as folder:
            pass
        with scratch_folder():
            pass
    assert folder.exists()
    with scratch_folder():
        assert not folder.exists()


def test_a_file_that_is_found_before_it_is_locked_is_made_again(temporary: Path, monkeypatch) -> None:
    found: list[Path] = []
    lock = fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        if not found:
            found.extend(temporary.glob("*.lock"))
            scratch._remove_abandoned()
        lock(descriptor, kind)

    monkeypatch.setattr(scratch.fcntl, "flock", late)
    with scratch_folder() as folder:
        assert folder.with_suffix(".lock") != found[0]
        assert {path.name for path in temporary.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_file_system_without_locks_does(temporary: Path, monkeypatch) -> None:
    def refused(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(scratch.fcntl, "flock", refused)
    with scratch_folder() as outer, scratch_folder():
        assert outer.is_dir()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_others_put_there_does_no_harm(temporary: Path, kind: str) -> None:
    precious, lock = temporary / "precious", temporary / f"{scratch._PREFIX}x.lock"
    precious.touch()
    lock.with_suffix("").mkdir()
    if kind == "link":
        lock.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with scratch_folder():
        assert lock.with_suffix("").exists()
    assert precious.exists()


def test_a_thread_may_work_in_the_folder_of_another_process(temporary: Path) -> None:
    (temporary / "theirs").mkdir()
    with scratch_within(temporary / "theirs"), scratch_folder() as folder:
        assert folder.parent == temporary / "theirs"
        assert list(temporary.glob("*.lock")) == []
    with scratch_folder() as folder:
        assert folder.parent == temporary
    assert list(temporary.rglob("*")) == [temporary / "theirs"]
