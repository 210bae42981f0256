"""The checkpoints of a search's trials: where they lie, which of them is the newest, which may go."""

from __future__ import annotations

import shutil
from pathlib import Path

from model import checkpoint
from tuner.trial import previews as read_previews


def newest(trials: Path, trial: str) -> Path | None:
    """The whole checkpoint folder of a trial that has come furthest, over all attempts."""
    return checkpoint.newest(_folders(trials, trial, "checkpoint_*"))


def prune(trials: Path, trial: str, keep: int) -> None:
    """Removes all but a trial's newest checkpoints. Ray would save its whole experiment each time that it does."""
    folders = sorted(_folders(trials, trial, "checkpoint_*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[: len(folders) - keep]:
        shutil.rmtree(folder, ignore_errors=True)


def previews(trials: Path, trial: str) -> dict[str, bytes]:
    """Pictures of the newest checkpoint, if it lies on a disk that the driver sees."""
    folders = sorted(_folders(trials, trial, "checkpoint_*/previews"), key=lambda f: f.stat().st_mtime)
    return read_previews(folders[-1].parent) if folders else {}


def _folders(trials: Path, trial: str, pattern: str) -> list[Path]:
    """What lies in the folders of a trial: one an attempt, and one more for each time that its worker died."""
    return [path for name in (trial, f"{trial}.*") for path in trials.glob(f"attempt-*/{name}/{pattern}")]
