"""Scratch folders, also of processes that are killed."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tuner import scratch
from tuner.scratch import scratch_folder

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
    (temporary / "segdec-scratch-somebody's").mkdir()  # without a lock, so not ours to judge
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode == -9
    assert len(list(temporary.rglob("training.pt"))) == 1
    with scratch_folder() as folder:
        assert list(temporary.rglob("training.pt")) == []
        assert {path.name for path in temporary.iterdir()} == {
            folder.name, f"{folder.name}.lock", "segdec-scratch-somebody's",
        }  # fmt: skip


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


def test_a_link_is_not_followed(temporary: Path) -> None:
    precious = temporary / "precious"
    (precious / "file").mkdir(parents=True)
    (temporary / "segdec-scratch-x").symlink_to(precious)
    (temporary / "segdec-scratch-x.lock").touch()
    with scratch_folder():
        assert (precious / "file").exists()
