"""Models and training states on disk. A checkpoint is whole or it is not there; nothing is read with pickle.

A model folder holds `model.safetensors`, `config.json` and `thresholds.json`: weights, epoch and thresholds are one
thing. A checkpoint folder holds such a folder `best/`, `training.pt` to go on from, `progress.json`, and a manifest
that is written last and says what belongs to it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.config import RunConfig
from model.files import write_json
from model.network import SegDecNet, build
from model.thresholds import Thresholds

MANIFEST = "manifest.json"
"""names the files of a checkpoint, each with its size and checksum"""


def save_model(
    directory: Path, weights: dict[str, torch.Tensor], config: RunConfig, thresholds: Thresholds, epoch: int
) -> None:
    """A model folder; `epoch` (counted from 1) is the one that the weights and the thresholds come from."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, directory / "model.safetensors")
    write_json(directory / "config.json", config.to_dict())
    write_json(directory / "thresholds.json", thresholds.to_dict() | {"epoch": epoch})


def load_model(directory: Path, device: torch.device) -> tuple[SegDecNet, RunConfig, Thresholds]:
    """The inverse of `save_model`. ValueError if the folder is no model."""
    try:
        config = RunConfig.from_dict(json.loads((directory / "config.json").read_text()))
        thresholds = Thresholds.from_dict(json.loads((directory / "thresholds.json").read_text()))
        network = build(config.architecture, width=config.width, norm=config.norm)
        network.load_state_dict(load_file(directory / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch lists each weight that differs
        raise ValueError(
            f"{directory} must hold model.safetensors, config.json and thresholds.json of one model ({first})"
        ) from error
    return network.to(device), config, thresholds


def seal(directory: Path) -> None:
    """Writes the manifest: from now on the folder is a checkpoint."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    write_json(directory / MANIFEST, {str(p.relative_to(directory)): _check(p) for p in files})


def is_whole(directory: Path, within: str = "") -> bool:
    """Whether every file of a checkpoint, or of what lies `within` it, is there as it was sealed; copying it may have
    been cut short."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        checks = {name: tuple(check) for name, check in manifest.items() if not within or name.startswith(f"{within}/")}
        return all(_check(directory / name) == check for name, check in checks.items())
    except (OSError, json.JSONDecodeError):
        return False


def _check(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    return len(data), zlib.crc32(data)


def save_training(directory: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values that training goes on from; where it fails, the file is as it was."""
    building = directory / "training.pt.part"
    torch.save(state, building)
    building.replace(directory / "training.pt")


def load_training(directory: Path, device: torch.device) -> dict[str, Any]:
    """The inverse of `save_training`; reads tensors and plain values alone."""
    state: dict[str, Any] = torch.load(directory / "training.pt", map_location=device, weights_only=True)
    return state


def load_progress(directory: Path) -> dict[str, Any]:
    """What a checkpoint's trial had reached."""
    progress: dict[str, Any] = json.loads((directory / "progress.json").read_text())
    return progress


def newest(folders: Iterable[Path]) -> Path | None:
    """The whole checkpoint among some that has come furthest."""
    whole = [folder for folder in folders if is_whole(folder)]
    return max(whole, key=lambda folder: load_progress(folder)["epochs"], default=None)
