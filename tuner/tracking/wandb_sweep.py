"""The sweep, workspace and report that W&B has for a run: made once, kept in `wandb/sweep.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from model.files import write_atomically, write_json
from tuner.tracking.wandb_files import SPACE, SWEEP
from tuner.tracking.wandb_pages import register


def sweep_of(directory: Path) -> dict[str, Any]:
    """What a server has made for a run, as `wandb_pages.register` answered; empty if nothing."""
    file = directory / SWEEP
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def make_pages(
    directory: Path, space: dict[str, Any], data: str, name: str, prior_runs: Iterable[str] = ()
) -> dict[str, Any]:
    """Has a server make what it has not made yet, and attach to the sweep those of `prior_runs` that it lacks.

    What fails is among the answer's `problems`, and comes with the next call.
    """
    known = {key: value for key, value in sweep_of(directory).items() if value}
    source = directory.resolve() / SPACE
    source.parent.mkdir(exist_ok=True)
    write_atomically(source, yaml.safe_dump(space, sort_keys=False).encode())
    request: dict[str, Any] = {"space": space, "source": str(source), "data": data, "search": name}
    request |= {"prior_runs": list(prior_runs), "pages": True}
    answer = register(known | request)
    kept = {key: value for key, value in answer.items() if key != "problems"}
    if any(kept.values()):
        write_json(directory / SWEEP, kept)
    return answer
